"""Layouts of inputs on every layer that has options for them, and what the error of another layout proposes."""

from __future__ import annotations

import re

import pytest
import torch

import fastvq

from ..cases import generator

DIM, SIZE = 4, 8
RVQ = {"dim": DIM, "num_quantizers": 2, "codebook_size": SIZE}
GROUPED = RVQ | {"groups": 2}
SHAPES = {1: (2, 5), 2: (2, 3, 5), 3: (2, 2, 3, 5)}


def vq(**options):
    return fastvq.VectorQuantize(DIM, SIZE, **options)


def rvq(**options):
    return fastvq.ResidualVQ(**RVQ, **options)


def grouped(**options):
    return fastvq.GroupedResidualVQ(**GROUPED, **options)


def projected(**options):
    return fastvq.RandomProjectionQuantizer(dim=DIM, codebook_size=SIZE, codebook_dim=3, num_codebooks=2, **options)


CHANNELS_FIRST = [
    (make, options, axes)
    for make in (vq, rvq, grouped, projected)
    for options, axes in (({"channel_last": False}, 1), ({"accept_image_fmap": True}, 2), ({"accept_3d_fmap": True}, 3))
] + [
    (make, {"channel_first": True}, axes)
    for make in (
        lambda **options: fastvq.SimVQ(DIM, SIZE, **options),
        lambda **options: fastvq.ResidualSimVQ(**RVQ, **options),
        lambda **options: fastvq.LFQ(dim=DIM, codebook_size=16, **options),
        lambda **options: fastvq.ResidualLFQ(dim=DIM, num_quantizers=2, codebook_size=16, **options),
        lambda **options: fastvq.GroupedResidualLFQ(dim=DIM, groups=2, num_quantizers=2, codebook_size=4, **options),
        lambda **options: fastvq.FSP([5] * DIM, **options),
        lambda **options: fastvq.FSQ([5] * DIM, **options),
    )
    for axes in (1, 2)
]


@pytest.mark.parametrize(("make", "options", "axes"), CHANNELS_FIRST)
def test_channels_first_are_channels_last_transposed(make, options, axes):
    """Results, decoding and what is learned, with a mask too."""
    shape = SHAPES[axes]
    rows = torch.randn(*shape, DIM, generator=generator())
    mask = torch.rand(shape, generator=generator(1)) < 0.8
    torch.manual_seed(0)
    layer = make(**options)
    torch.manual_seed(0)
    flat = make()
    for kwargs in ({}, {"mask": mask}):
        torch.manual_seed(1)
        ours = layer(rows.movedim(-1, 1), **kwargs)
        torch.manual_seed(1)
        flat_mask = {"mask": mask.flatten(1)} if kwargs else {}
        theirs = flat(rows.flatten(1, -2), **flat_mask)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs.unflatten(1, shape[1:]))
            continue
        assert torch.equal(ours[0], theirs[0].unflatten(1, shape[1:]).movedim(-1, 1))
        axis = 2 if "Grouped" in type(layer).__name__ else 1
        assert torch.equal(ours[1], theirs[1].unflatten(axis, shape[1:]))
    for one, other in zip(layer.state_dict().values(), flat.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    if hasattr(layer, "get_output_from_indices"):
        layer.eval()
        quantized, indices = layer(rows.movedim(-1, 1))[:2]
        torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("make", [rvq, grouped, projected])
def test_two_kinds_of_maps(make):
    with pytest.raises(ValueError, match=r"^accept_image_fmap, accept_3d_fmap: only one"):
        make(accept_image_fmap=True, accept_3d_fmap=True)


IMAGE, SEQUENCE, VIDEO = (2, DIM, 8, 9), (2, DIM, 9), (2, DIM, 7, 8, 9)
LAST = (2, 9, DIM)
PROPOSALS = [
    (vq, {}, IMAGE, "for (B, dim, H, W) set accept_image_fmap=True"),
    (vq, {}, VIDEO, "for (B, dim, T, H, W) set accept_3d_fmap=True"),
    (vq, {}, SEQUENCE, "for (B, dim, N) set channel_last=False"),
    (vq, {"channel_last": False}, LAST, "for (B, N, dim) set channel_last=True"),
    (vq, {"channel_last": False}, IMAGE, "for (B, dim, H, W) set accept_image_fmap=True"),
    (vq, {"accept_image_fmap": True}, LAST, "for (B, N, dim) set accept_image_fmap=False"),
    (vq, {"accept_image_fmap": True}, VIDEO, "set accept_image_fmap=False and accept_3d_fmap=True"),
    (vq, {"accept_3d_fmap": True}, IMAGE, "set accept_3d_fmap=False and accept_image_fmap=True"),
    (rvq, {}, IMAGE, "for (B, dim, H, W) set accept_image_fmap=True"),
    (rvq, {}, SEQUENCE, "for (B, dim, N) set channel_last=False"),
    (grouped, {}, IMAGE, "for (B, dim, H, W) set accept_image_fmap=True"),
    (grouped, {}, SEQUENCE, "for (B, dim, N) set channel_last=False"),
    (grouped, {"accept_image_fmap": True}, LAST, "for (B, N, dim) set accept_image_fmap=False"),
    (projected, {}, IMAGE, "for (B, dim, H, W) set accept_image_fmap=True"),
    (projected, {}, SEQUENCE, "for (B, dim, N) set channel_last=False"),
    (lambda **o: fastvq.SimVQ(DIM, SIZE, **o), {}, IMAGE, "for (B, dim, H, W) set channel_first=True"),
    (lambda **o: fastvq.SimVQ(DIM, SIZE, **o), {"channel_first": True}, LAST, "set channel_first=False"),
    (lambda **o: fastvq.ResidualSimVQ(**RVQ, **o), {}, SEQUENCE, "set channel_first=True"),
    (lambda **o: fastvq.LFQ(dim=DIM, **o), {}, SEQUENCE, "for (B, dim, N) set channel_first=True"),
    (lambda **o: fastvq.LFQ(dim=DIM, **o), {}, (2, 8, 9, DIM), "for (B, H, W, dim) set channel_first=False"),
    (lambda **o: fastvq.ResidualLFQ(**RVQ, **o), {}, SEQUENCE, "set channel_first=True"),
    (lambda **o: fastvq.FSQ([5] * DIM, **o), {}, SEQUENCE, "set channel_first=True"),
    (lambda **o: fastvq.FSQ([5] * DIM, **o), {}, (2, 8, 9, DIM), "pass x.movedim(-1, 1)"),
    (lambda **o: fastvq.FSP([5] * DIM, **o), {}, IMAGE, "set channel_first=True"),
    (
        lambda **o: fastvq.ResidualFSQ(levels=[5] * DIM, num_quantizers=2, **o),
        {},
        IMAGE,
        "set is_channel_first=True",
    ),
    (
        lambda **o: fastvq.GroupedResidualFSQ(dim=DIM, levels=[5, 5], groups=2, num_quantizers=2, **o),
        {},
        IMAGE,
        "set accept_image_fmap=True",
    ),
    (
        lambda **o: fastvq.GroupedResidualLFQ(dim=DIM, codebook_size=4, groups=2, num_quantizers=2, **o),
        {},
        IMAGE,
        "set accept_image_fmap=True",
    ),
    (lambda **o: fastvq.LatentQuantize([5] * DIM, DIM, **o), {}, LAST, "pass x.movedim(-1, 1)"),
    (
        lambda **o: fastvq.HierarchicalVQ(dim=DIM, codebook_size=SIZE, scales=(1, 2), **o),
        {},
        IMAGE,
        "set channel_first=True and accept_image_fmap=True",
    ),
    (
        lambda **o: fastvq.HierarchicalVQ(dim=DIM, codebook_size=SIZE, scales=(1, 2), **o),
        {},
        LAST,
        "set channel_first=False",
    ),
]


@pytest.mark.parametrize(("make", "options", "shape", "proposal"), PROPOSALS)
def test_the_error_proposes_an_option(make, options, shape, proposal):
    """And the option that it proposes works."""
    with pytest.raises(ValueError, match=r"^x: must have .*got \(2, .*\): " + ".*" + re.escape(proposal)):
        make(**options)(torch.zeros(shape))
    if "movedim" in proposal:
        make(**options)(torch.zeros(shape).movedim(-1, 1))
    elif "neither" not in proposal:
        settings = dict(re.findall(r"(\w+)=(True|False)", proposal))
        make(**options | {name: value == "True" for name, value in settings.items()})(torch.randn(shape))


@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 3), (2, 3, 8, 8)])
def test_no_proposal_for_a_wrong_dimension(shape):
    with pytest.raises(ValueError, match=r"with dim=4, got \([0-9, ]+\)$"):
        vq()(torch.zeros(shape))


FROZEN = {
    "VectorQuantize": vq,
    "ResidualVQ": rvq,
    "GroupedResidualVQ": grouped,
    "HierarchicalVQ": lambda **o: fastvq.HierarchicalVQ(
        dim=DIM, codebook_size=SIZE, scales=(1, 5), channel_first=False, kmeans_init=False, **o
    ),
    "HierarchicalVQ, apart": lambda **o: fastvq.HierarchicalVQ(
        dim=DIM, codebook_size=(SIZE, 4), scales=(1, 5), channel_first=False, shared_codebook=False, **o
    ),
    "shared": lambda **o: rvq(shared_codebook=True, **o),
    "k-means": lambda **o: rvq(kmeans_init=True, **o),
    "dropout": lambda **o: rvq(quantize_dropout=True, **o),
    "learnable": lambda **o: rvq(learnable_codebook=True, kmeans_init=True, **o),
    "Sequential": lambda **o: fastvq.Sequential(torch.nn.Identity(), vq(**o)),
}


def learns(layer, **forward):
    """Return whether a step changes the state, or gives a codebook a gradient."""
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(2, 5, DIM, generator=generator(), requires_grad=True)
    layer.zero_grad()
    quantized, _, loss = layer(x, **forward)
    (quantized.sum() + loss.sum()).backward()
    moved = any(not torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    return moved or any(p.grad is not None for n, p in layer.named_parameters() if n.endswith("embed"))


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_by_constructor_attribute_or_call(kind):
    make = FROZEN[kind]
    assert learns(make())
    assert not learns(make(freeze_codebook=True))
    assert learns(make(freeze_codebook=True), freeze_codebook=False)
    layer = make()
    layer.freeze_codebook = True
    assert layer.freeze_codebook is True
    assert not learns(layer)
    assert learns(layer, freeze_codebook=False)
    layer.freeze_codebook = False
    assert not learns(layer, freeze_codebook=True)
    assert learns(layer)


@pytest.mark.parametrize(
    "options", [{}, {"kmeans_init": True}, {"learnable_codebook": True}, {"beam_size": 2}], ids=str
)
def test_a_single_frozen_stage(options):
    layer = rvq(**options)
    layer.layers[1].freeze_codebook = True
    assert not layer.freeze_codebook
    before = [stage.codebook.detach().clone() for stage in layer.layers]
    losses = layer(torch.randn(2, 5, DIM))[2]
    if "learnable_codebook" in options:
        losses.sum().backward()
        assert [stage._codebook.embed.grad is None for stage in layer.layers] == [False, True]
        return
    assert not torch.equal(layer.layers[0].codebook, before[0])
    assert torch.equal(layer.layers[1].codebook, before[1])
