"""Heads: split into the rows of each codebook, and back."""

from __future__ import annotations

import pytest
import torch

from fastvq.parts.shapes import Heads, offset_indices

from ..cases import generator

B, N, D = 3, 5, 4
KINDS = [Heads(), Heads(2), Heads(3, separate=True), Heads(1, separate=True)]


@pytest.mark.parametrize("heads", KINDS, ids=str)
def test_round_trip(heads):
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
