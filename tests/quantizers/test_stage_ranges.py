"""The arguments `n_quantizers` and `start` of every residual quantizer: in forward, in encode, and in decoding."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

import fastvq

from ..cases import close, generator

DIM, STAGES, LENGTH = 4, 3, 8
stack = {"dim": DIM, "num_quantizers": STAGES, "codebook_size": 16}
LAYERS = {
    "ResidualVQ": partial(fastvq.ResidualVQ, **stack),
    "ResidualVQ by stage": partial(fastvq.ResidualVQ, **stack, commitment_use_cross_entropy_loss=True),
    "ResidualVQ, projected": partial(fastvq.ResidualVQ, **stack, codebook_dim=3),
    "ResidualVQ, stages first": partial(fastvq.ResidualVQ, **stack, stage_axis=0),
    "SplitResidualVQ": partial(fastvq.SplitResidualVQ, **stack, codebook_dim=3),
    "SplitResidualVQ, stages second": partial(fastvq.SplitResidualVQ, **stack, stage_axis=1),
    "FactorizedResidualVQ": partial(fastvq.FactorizedResidualVQ, DIM, 16, STAGES, 2),
    "FactorizedResidualVQ, stages second": partial(fastvq.FactorizedResidualVQ, DIM, 16, STAGES, 2, stage_axis=1),
    "StridedResidualVQ": partial(fastvq.StridedResidualVQ, DIM, 16, (4, 2, 1), 2),
    "ResidualSimVQ": partial(fastvq.ResidualSimVQ, **stack),
    "ResidualLFQ": partial(fastvq.ResidualLFQ, **stack),
    "ResidualFSQ": partial(fastvq.ResidualFSQ, levels=[5, 5, 3, 3], num_quantizers=STAGES),
    "ResidualFSQ, projected": partial(fastvq.ResidualFSQ, levels=[5, 3], dim=DIM, num_quantizers=STAGES),
    "GroupedResidualVQ": partial(fastvq.GroupedResidualVQ, **stack, groups=2),
    "GroupedResidualLFQ": partial(fastvq.GroupedResidualLFQ, **{**stack, "codebook_size": 4}, groups=2),
    "GroupedResidualFSQ": partial(fastvq.GroupedResidualFSQ, dim=DIM, levels=[5, 3], num_quantizers=STAGES, groups=2),
}
WITHOUT_PROJECTIONS = [name for name in LAYERS if "projected" not in name and "SplitResidualVQ" not in name]
every = pytest.mark.parametrize("name", LAYERS)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().eval()


def vectors(seed: int = 1) -> Tensor:
    return torch.randn(2, LENGTH, DIM, generator=generator(seed))


def stages(layer: torch.nn.Module, indices: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the indices of each stage, the batch first."""
    if isinstance(indices, tuple):
        return list(indices)
    if isinstance(layer, fastvq.quantizers.grouped.Grouped):
        indices = indices.movedim(0, -1)
        return list(indices.unbind(-2))
    axis = getattr(layer, "semantic", layer)
    return list(indices.unbind(getattr(axis, "stage_axis", -1)))


@every
@torch.no_grad()
def test_each_item_has_a_number_of_its_own(name):
    layer, x = make(name), vectors()
    numbers = torch.tensor([1, 3])
    full = layer.encode(x)
    quantized, indices, *_ = layer(x, n_quantizers=numbers)
    for found in (indices, layer.encode(x, n_quantizers=numbers)):
        for stage, (own, whole) in enumerate(zip(stages(layer, found), stages(layer, full), strict=True)):
            assert torch.equal(own[1], whole[1])
            assert torch.equal(own[0], whole[0] if stage == 0 else torch.full_like(own[0], -1))
    for item, number in enumerate(numbers.tolist()):
        close(quantized[item], layer(x, n_quantizers=number)[0][item], tolerance={"rtol": 1e-4, "atol": 1e-5})
    close(layer.get_output_from_indices(full, n_quantizers=numbers), quantized, tolerance={"rtol": 1e-4, "atol": 1e-5})
    close(
        layer.get_output_from_indices(full, n_quantizers=2),
        layer(x, n_quantizers=2)[0],
        tolerance={"rtol": 1e-4, "atol": 1e-5},
    )


@every
@torch.no_grad()
def test_training_takes_the_numbers_too(name):
    layer, x, numbers = make(name), vectors(), torch.tensor([1, 2])
    expected = copy.deepcopy(layer).encode(x, n_quantizers=numbers)
    quantized, found, *rest = layer.train()(x, n_quantizers=numbers)
    assert all(map(torch.equal, stages(layer, found), stages(layer, expected)))
    assert quantized.isfinite().all()
    for losses in rest:
        assert losses.shape[-1] == STAGES
        assert losses.isfinite().all()
        assert not losses[..., 2].any()


@every
@torch.no_grad()
def test_stages_from_a_later_one_on(name):
    layer, x = make(name), vectors()
    for options in ({"start": 1}, {"start": 1, "n_quantizers": 2}, {"start": 1, "n_quantizers": torch.tensor([2, 3])}):
        quantized, found, *_ = layer(x, **options)
        own = stages(layer, found)
        assert (own[0] == -1).all()
        assert (own[1] >= 0).all()
        assert all(map(torch.equal, stages(layer, layer.encode(x, **options)), own))
        close(layer.get_output_from_indices(found), quantized, tolerance={"rtol": 1e-4, "atol": 1e-5})
        close(layer.get_output_from_indices(found, **options), quantized, tolerance={"rtol": 1e-4, "atol": 1e-5})
        layer.train()(x, **options)
        layer = make(name)


@pytest.mark.parametrize("name", WITHOUT_PROJECTIONS)
@torch.no_grad()
def test_a_later_stage_finds_in_a_residual_what_it_finds_within_the_stack(name):
    layer, x = make(name), vectors()
    if "FSQ" in name:
        x = 0.5 * x  # where the soft clamp of the first stage changes hardly anything
    full = layer.encode(x)
    rest = x - layer.get_output_from_indices(full, n_quantizers=1)
    if "FSQ" in name:
        parts = layer.rvqs if hasattr(layer, "rvqs") else [layer]
        clamped = torch.cat(
            [part._soft_clamp(own) for part, own in zip(parts, x.chunk(len(parts), -1), strict=True)], -1
        )
        rest = rest - x + clamped
    found = stages(layer, layer.encode(rest, start=1))
    assert all(map(torch.equal, found[1:], stages(layer, full)[1:]))
    whole, first = layer.get_output_from_indices(full), layer.get_output_from_indices(full, n_quantizers=1)
    close(layer.get_output_from_indices(full, start=1), whole - first, tolerance={"rtol": 1e-4, "atol": 1e-5})


@every
def test_ranges_that_cannot_be(name):
    layer, x = make(name), vectors()
    full = layer.encode(x)
    for call in (layer, layer.encode, lambda _, **options: layer.get_output_from_indices(full, **options)):
        for options, kind, message in (
            ({"n_quantizers": 0}, ValueError, r"n_quantizers: must lie in \[1, 3\], got 0"),
            ({"n_quantizers": 4}, ValueError, r"n_quantizers: must lie in \[1, 3\], got 4"),
            ({"n_quantizers": 1.5}, TypeError, "n_quantizers: must be an int or a tensor of ints, got 1.5"),
            ({"start": 3}, ValueError, r"start: must be an integer in \[0, 3\), got 3"),
            ({"start": 1, "n_quantizers": 1}, ValueError, r"n_quantizers: must lie in \[2, 3\] beside start=1, got 1"),
            ({"n_quantizers": torch.tensor([0, 3])}, ValueError, r"must lie in \[1, 3\], got \[0, 3\]"),
            (
                {"start": 2, "n_quantizers": torch.tensor([2, 3])},
                ValueError,
                r"n_quantizers: must lie in \[3, 3\] beside start=2, got \[2, 3\]",
            ),
            ({"n_quantizers": torch.tensor([3])}, ValueError, r"n_quantizers: must have shape \(B,\) = \(2,\), got"),
        ):
            with pytest.raises(kind, match=message):
                call(x, **options)


def test_stages_at_another_axis_are_named():
    """The message counts them where the layer looks for them."""
    x, layer = vectors(), make("ResidualVQ, stages first")
    with pytest.raises(ValueError, match=r"^indices: must have 1 to 3 stages at axis 0, got 8"):
        layer.get_output_from_indices(layer.encode(x).movedim(-1, 0))
    split = make("SplitResidualVQ, stages second")
    with pytest.raises(ValueError, match=r"^indices: must have 1 to 3 stages at axis 1, got 8"):
        split.get_output_from_indices(split.encode(x).movedim(1, -1))


def test_semantic_stages_alone_and_acoustic_stages_alone():
    layer, x = make("SplitResidualVQ"), vectors()
    before = copy.deepcopy(layer.state_dict())
    quantized, indices, losses = layer.train()(x, n_quantizers=torch.tensor([1, 1]))
    close(quantized, layer.eval().get_output_from_indices(indices, n_quantizers=1), tolerance={"rtol": 1, "atol": 1})
    assert (indices[..., 1:] == -1).all()
    assert not losses[1:].any()
    state = layer.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, state[name])}
    assert moved
    assert all(name.startswith("semantic.") for name in moved)  # stages that take no part don't forget
    split = fastvq.SplitResidualVQ(dim=DIM, num_quantizers=4, num_semantic=2, codebook_size=8).eval()
    acoustic = split(x, start=2)
    expected = split.acoustic(x)
    close(acoustic[0], expected[0])
    assert torch.equal(acoustic[1][..., 2:], expected[1])
    with pytest.raises(ValueError, match="start: must be 0 or at least num_semantic=2"):
        split(x, start=1)


@pytest.mark.parametrize("name", ["SplitResidualVQ", "SplitResidualVQ, stages second"])
def test_all_codes_of_split_stages(name):
    layer, x = make(name), vectors().requires_grad_()
    *_, codes = layer.train()(x, return_all_codes=True, codes_gradient=True)
    assert codes.shape == (STAGES, 2, LENGTH, layer.semantic.codebook_dim)
    (grad,) = torch.autograd.grad(codes[0].square().sum(), x)  # distillation of the semantic stage
    assert grad.any()
    layer.eval()
    _, indices, _, codes = layer(x, return_all_codes=True)
    close(codes, layer.get_codes_from_indices(indices))
    axis = layer.semantic.stage_axis
    close(layer.get_codes_from_indices(indices.narrow(axis, 0, 1))[0], codes[0])
    _, _, _, codes = layer(x, return_all_codes=True, start=1)
    assert [bool(one.any()) for one in codes] == [False, True, True]
    with pytest.raises(ValueError, match="codes_gradient: must be False without return_all_codes"):
        layer(x, codes_gradient=True)


def test_masked_vectors_beside_split_stages_are_zero():
    with pytest.raises(ValueError, match="return_zeros_for_masked_padding: must be True"):
        fastvq.SplitResidualVQ(**stack, return_zeros_for_masked_padding=False)


def test_a_compiled_program_takes_a_number_for_each_item():
    layer, x = make("SplitResidualVQ"), vectors()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for numbers in (torch.tensor([1, 3]), torch.tensor([2, 2])):
        with torch.no_grad():
            assert torch.equal(compiled(x, n_quantizers=numbers)[1], layer(x, n_quantizers=numbers)[1])
