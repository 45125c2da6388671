"""Shapes: layouts and heads, the indices and masks of both, and rejected inputs."""

from __future__ import annotations

import pytest
import torch

from fastvq.parts.shapes import Heads, Layout, codes_in_layout, offset_indices

from ..cases import generator

DIM = 6
SPATIAL = {"single": (), "sequence": (5,), "image": (2, 3), "video": (2, 3, 2), "more": (2, 1, 3, 2)}


def batch(spatial, channel_first, b=4):
    shape = (b, DIM, *spatial) if channel_first else (b, *spatial, DIM)
    return torch.randn(shape, generator=generator())


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("kind", SPATIAL)
def test_layout_round_trip(kind, channel_first):
    spatial = SPATIAL[kind]
    x = batch(spatial, channel_first)
    layout = Layout.of(x, DIM, channel_first=channel_first)
    rows = layout.to_rows(x)
    last = x.movedim(1, -1) if channel_first else x
    assert rows.shape == (4, layout.rows, DIM)
    assert torch.equal(rows.flatten(0, 1), last.reshape(-1, DIM))
    assert torch.equal(layout.from_rows(rows), x)
    several = layout.from_rows(torch.stack([rows, -rows], 2))  # as of top-k
    assert several.shape == ((4, DIM, *spatial, 2) if channel_first and spatial else (4, *spatial, 2, DIM))
    indices = torch.arange(4 * layout.rows).view(4, -1)
    assert layout.indices(indices).shape == (4, *spatial)
    assert layout.indices(indices[..., None]).shape == (4, *spatial, 1)
    assert torch.equal(layout.indices_to_rows(layout.indices(indices)), indices)
    assert torch.equal(codes_in_layout(last, channel_first), x)


@pytest.mark.parametrize("shape", [(0, 5, DIM), (4, 0, DIM), (0, DIM), (0, 2, 0, DIM)])
def test_empty_batches(shape):
    x = torch.zeros(shape)
    layout = Layout.of(x, DIM)
    assert layout.from_rows(layout.to_rows(x)).shape == shape
    assert layout.indices(layout.to_rows(x)[..., 0]).shape == shape[:-1]


def test_channels_second_for_images_if_not_told():
    assert Layout.of(batch((2, 3), True), DIM, channel_first=None).spatial == (2, 3)
    assert not Layout.of(batch((5,), False), DIM, channel_first=None).channel_first
    assert not Layout.of(batch((), True), DIM, channel_first=True).channel_first


@pytest.mark.parametrize("kind", SPATIAL)
def test_masks_have_the_shape_of_the_indices(kind):
    spatial = SPATIAL[kind]
    mask = torch.rand(4, *spatial, generator=generator()) < 0.5
    layout = Layout.of(batch(spatial, True), DIM, channel_first=True)
    assert torch.equal(layout.rows_mask(mask), mask.reshape(4, -1))
    assert layout.rows_mask(None) is None


def test_lens():
    lens = torch.tensor([0, 3, 4, 5])
    layout = Layout.of(batch((5,), True), DIM, channel_first=True)
    assert layout.rows_mask(None, lens).sum(1).tolist() == [0, 3, 4, 5]
    assert layout.rows_mask(None, lens)[1].tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(4, 5, 5), {}, ValueError, r"x: must have shape \(B, N, dim\) or .* or \.\.\. with dim=6, got"),
        (torch.zeros(6), {}, ValueError, "x: must have shape"),
        (torch.zeros(4, 5, 6), {"channel_first": True}, ValueError, r"x: must have shape \(B, dim, N\)"),
        (torch.zeros(4, 5, 6), {"spatial": (2,)}, ValueError, r"x: must have shape \(B, H, W, dim\) with dim=6"),
        (torch.zeros(4, 2, 5, 6), {"spatial": (0, 1)}, ValueError, r"x: must have shape \(B, N, dim\) or \(B, dim\) w"),
        (torch.zeros(4, 6, dtype=torch.int64), {}, TypeError, "x: must be floating point"),
    ],
)
def test_refuses_a_batch(x, options, error, message):
    with pytest.raises(error, match=message):
        Layout.of(x, DIM, **options)


@pytest.mark.parametrize(
    ("mask", "lens", "error", "message"),
    [
        (torch.ones(4, 5), None, TypeError, "mask: must be bool"),
        (torch.ones(4, 6).bool(), None, ValueError, r"mask: must have shape \(4, 5\), got \(4, 6\)"),
        (None, torch.ones(3).int(), ValueError, r"lens: must have shape \(4,\)"),
        (None, torch.ones(4), TypeError, "lens: must be a tensor of ints, got torch.float32"),
        (None, torch.tensor([0, 3, 5, 9]), ValueError, r"lens: must lie in \[0, 5\]"),
        (torch.ones(4, 5).bool(), torch.ones(4), ValueError, "mask, lens: only one"),
    ],
)
def test_refuses_a_mask(mask, lens, error, message):
    with pytest.raises(error, match=message):
        Layout.of(batch((5,), False), DIM).rows_mask(mask, lens)


def test_refuses_lens_of_images():
    with pytest.raises(ValueError, match="lens: is for sequences"):
        Layout.of(batch((2, 3), False), DIM).rows_mask(None, torch.ones(4))


def test_refuses_indices():
    with pytest.raises(ValueError, match="indices: must have shape"):
        Layout.of(batch((5,), False), DIM).indices_to_rows(torch.zeros(4, 6))


def test_compiles_for_any_length():
    def through(x, mask):
        layout = Layout.of(x, DIM, channel_first=True)
        rows = layout.to_rows(x) * layout.rows_mask(mask)[..., None]
        return layout.from_rows(rows), layout.indices(rows.sum(-1))

    compiled = torch.compile(through, fullgraph=True, dynamic=True, backend="eager")
    for spatial in ((5,), (7,), (2, 3)):
        x, mask = batch(spatial, True), torch.ones(4, *spatial, dtype=torch.bool)
        for a, b in zip(compiled(x, mask), through(x, mask), strict=True):
            assert torch.equal(a, b)


B, N, D = 3, 5, 4
KINDS = [Heads(), Heads(2), Heads(3, separate=True), Heads(1, separate=True)]


@pytest.mark.parametrize("heads", KINDS, ids=str)
def test_heads_round_trip(heads):
    x = torch.randn(B, N, heads.number * D, generator=generator())
    rows = heads.split(x)
    assert rows.shape == (heads.codebooks, B * N * heads.number // heads.codebooks, D)
    assert torch.equal(heads.join(rows, B, N), x)
    several = heads.join(torch.stack([rows, -rows], 2), B, N)  # as of top-k
    assert torch.equal(several, torch.stack([x, -x], 2))


@pytest.mark.parametrize("heads", KINDS, ids=str)
def test_indices_and_masks_follow_their_parts(heads):
    """An index that encodes its batch, place and head stays with its part."""
    shape = (B, N, heads.number) if heads.number > 1 else (B, N)
    indices = torch.arange(B * N * heads.number).view(shape)
    parts = indices.view(B, N, heads.number, 1).expand(-1, -1, -1, D).flatten(2).float()
    split = heads.split_indices(indices)
    assert torch.equal(heads.split(parts)[..., 0].long(), split)
    assert torch.equal(heads.join_indices(split, B, N), indices)
    assert heads.join_indices(split[..., None], B, N).shape == (*shape, 1)
    mask = torch.rand(B, N, generator=generator()) < 0.5
    every = mask[..., None].expand(B, N, heads.number).reshape(shape)
    assert torch.equal(heads.split_mask(mask), heads.split_indices(every))
    assert heads.split_mask(None) is None


def test_offset_indices():
    indices = torch.tensor([[0, -1, 2], [1, 2, -1]])
    assert offset_indices(indices, 3).tolist() == [0, -1, 2, 4, 5, -1]
    assert offset_indices(indices[:1], 3).tolist() == [0, -1, 2]
    assert offset_indices(indices[..., None], 3).shape == (6, 1)
