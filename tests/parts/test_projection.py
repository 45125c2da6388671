"""Projections around a quantizer may be replaced by any module."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastvq

from ..cases import generator

DIM = 6
LAYERS = {
    "VectorQuantize": lambda: fastvq.VectorQuantize(dim=DIM, codebook_size=16, codebook_dim=3),
    "ResidualVQ": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=16, codebook_dim=3, num_quantizers=2),
    "FSQ": lambda: fastvq.FSQ([5, 4, 3], dim=DIM),
    "ResidualFSQ": lambda: fastvq.ResidualFSQ(levels=[5, 5, 3], num_quantizers=2, dim=DIM),
    "FSP": lambda: fastvq.FSP([5, 4, 3], dim=DIM),
    "LFQ": lambda: fastvq.LFQ(codebook_size=8, dim=DIM),
    "ResidualLFQ": lambda: fastvq.ResidualLFQ(codebook_size=8, dim=DIM, num_quantizers=2),
    "LatentQuantize": lambda: fastvq.LatentQuantize(levels=[5, 4, 3], dim=DIM),
}


def batch(kind: str) -> torch.Tensor:
    x = torch.randn(2, 7, DIM, generator=generator())
    x[1, 2, 0] = torch.nan
    return x.mT.contiguous() if kind == "LatentQuantize" else x  # which takes (B, dim, N)


def channels_last(kind: str, quantized: torch.Tensor) -> torch.Tensor:
    return quantized.mT if kind == "LatentQuantize" else quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_projections_in_a_sequential(kind, dtype):
    layer = LAYERS[kind]().to(dtype).eval()
    x = batch(kind).to(dtype)
    expected = layer(x)
    layer.project_in, layer.project_out = nn.Sequential(layer.project_in), nn.Sequential(layer.project_out)
    quantized, indices = layer(x)[:2]
    assert torch.equal(quantized, expected[0])
    assert torch.equal(indices, expected[1])
    assert not channels_last(kind, quantized)[1, 2].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_dynamically_quantized_projections(kind):
    layer, x = LAYERS[kind]().eval(), batch(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        for name in ("project_in", "project_out"):
            # A bare nn.Linear has no child to convert, hence the nn.Sequential.
            original = nn.Sequential(getattr(layer, name))
            setattr(layer, name, torch.ao.quantization.quantize_dynamic(original, {nn.Linear}))
    quantized, indices = layer(x)[:2]
    assert quantized.shape == x.shape
    assert quantized.isfinite().all()
    assert not channels_last(kind, quantized)[1, 2].any()
    assert (indices[1, 2] == -1).all()


class Adapted(nn.Module):
    """A frozen linear map with an added one of low rank, as LoRA has it: no nn.Linear, and no weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapt(layer, name):
    setattr(layer, name, Adapted(getattr(layer, name)))


def parametrized(layer, name):
    torch.nn.utils.parametrize.register_parametrization(getattr(layer, name), "weight", Doubled())


@pytest.mark.parametrize("change", [adapt, parametrized])
@pytest.mark.parametrize("kind", LAYERS)
def test_adapted_and_parametrized_projections(kind, change):
    """They are applied, and learn."""
    layer = LAYERS[kind]()
    x = batch(kind).nan_to_num()
    before = layer.eval()(x)[0]
    for name in ("project_in", "project_out"):
        change(layer, name)
    after = layer(x)[0]
    assert after.shape == x.shape
    assert not torch.equal(after, before)
    layer.train()(x)[0].square().sum().backward()
    for name in ("project_in", "project_out"):
        learned = [p for p in getattr(layer, name).parameters() if p.requires_grad]
        assert learned
        assert all(p.grad is not None for p in learned)


IDENTITIES = {
    "VectorQuantize": lambda: fastvq.VectorQuantize(dim=DIM, codebook_size=16),
    "sampling": lambda: fastvq.VectorQuantize(dim=DIM, codebook_size=16, stochastic_sample_codes=True),
    "ResidualVQ": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=16, num_quantizers=2),
    "FSQ": lambda: fastvq.FSQ([5, 4, 3, 5, 4, 3]),
    "ResidualFSQ": lambda: fastvq.ResidualFSQ(levels=[5, 5, 3, 5, 4, 3], num_quantizers=2),
    "FSP": lambda: fastvq.FSP([5, 4, 3, 5, 4, 3]),
    "LFQ": lambda: fastvq.LFQ(codebook_size=64),
    "ResidualLFQ": lambda: fastvq.ResidualLFQ(codebook_size=64, num_quantizers=2, dim=DIM),
    "LatentQuantize": lambda: fastvq.LatentQuantize(levels=[5, 4, 3, 5, 4, 3], dim=DIM),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", IDENTITIES)
def test_modules_in_place_of_identities(kind, training):
    """They are applied as in vector_quantize_pytorch, which calls whatever stands there."""
    layer = IDENTITIES[kind]().train(training)
    assert type(layer.project_in) is type(layer.project_out) is nn.Identity
    called = []
    for name in ("project_in", "project_out"):
        setattr(layer, name, nn.Sequential(nn.Linear(DIM, DIM)))
        getattr(layer, name).register_forward_hook(lambda module, args, out, name=name: called.append(name))
    quantized, indices = layer(batch(kind).nan_to_num())[:2]
    assert called == ["project_in", "project_out"]
    if not training and hasattr(layer, "get_output_from_indices"):
        torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)


STACKS = {
    "ResidualVQ": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=16, num_quantizers=3),
    "cosine": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=16, num_quantizers=3, use_cosine_sim=True),
    "learnable": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=16, num_quantizers=3, learnable_codebook=True),
    "k-means": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=8, num_quantizers=3, kmeans_init=True),
    "beams": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=16, num_quantizers=3, beam_size=4),
    "implicit": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=8, num_quantizers=3, implicit_neural_codebook=True),
    "ResidualFSQ": lambda: fastvq.ResidualFSQ(levels=[5, 5, 3, 5, 4, 3], num_quantizers=3),
    "ResidualLFQ": lambda: fastvq.ResidualLFQ(codebook_size=64, num_quantizers=3, dim=DIM),
    "GroupedResidualVQ": lambda: fastvq.GroupedResidualVQ(dim=2 * DIM, groups=2, codebook_size=16, num_quantizers=3),
}


def project_last_stage(layer):
    """Put linear maps into the last stages, beside identities in the others, and return the list of their calls."""
    called = []
    for stack in getattr(layer, "rvqs", [layer]):
        stage = stack.layers[-1]
        for name in ("project_in", "project_out"):
            assert type(getattr(stage, name)) is nn.Identity
            setattr(stage, name, nn.Sequential(nn.Linear(DIM, DIM)))
            getattr(stage, name).register_forward_hook(lambda module, args, out, name=name: called.append(name))
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", STACKS)
def test_modules_in_place_of_the_identities_of_a_stage(kind, training, dtype):
    torch.manual_seed(0)
    layer = STACKS[kind]().train(training)
    called = project_last_stage(layer)
    layer.to(dtype)
    x = torch.randn(2, 9, getattr(layer, "dim", DIM), generator=generator()).to(dtype)
    x[1, 2] = torch.nan
    quantized, indices = layer(x)[:2]
    assert {"project_in", "project_out"} == set(called)
    assert quantized.isfinite().all()
    assert not quantized[1, 2].any()
    if training:
        quantized.float().square().sum().backward()
        last = getattr(layer, "rvqs", [layer])[0].layers[-1]
        assert last.project_out[0].weight.grad.isfinite().all()
        return
    codes = layer(x, return_all_codes=True)[-1]
    total = torch.cat([each.sum(0) for each in codes], -1) if isinstance(codes, tuple) else codes.sum(0)
    for found in (total, layer.get_output_from_indices(indices)):
        torch.testing.assert_close(found.to(dtype), quantized, rtol=0.02, atol=0.02)
    if hasattr(layer, "encode"):
        assert torch.equal(layer.encode(x), indices)


@pytest.mark.parametrize("kind", ["ResidualVQ", "cosine", "learnable", "ResidualLFQ"])
def test_projected_stages_are_those_that_are_called_one_by_one(kind):
    torch.manual_seed(0)
    layer = STACKS[kind]().eval()
    project_last_stage(layer)
    residual = x = torch.randn(2, 9, DIM, generator=generator())
    total, found = torch.zeros_like(x), []
    for stage in layer.layers:
        quantized, chosen = stage(residual)[:2]
        residual, total = residual - quantized, total + quantized
        found.append(chosen)
    quantized, indices = layer(x)[:2]
    assert torch.equal(indices, torch.stack(found, -1))
    torch.testing.assert_close(quantized, total)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("setting", ["rotation_trick", "commitment_weight", "stochastic_sample_codes"])
def test_attributes_of_one_stage(setting, training):
    """A stage with other settings than the first one has them, as if it were called by itself."""
    torch.manual_seed(0)
    layer = fastvq.ResidualVQ(dim=DIM, codebook_size=16, num_quantizers=2).train(training)
    value = {"rotation_trick": False, "commitment_weight": 0.25, "stochastic_sample_codes": True}[setting]
    setattr(layer.layers[1], setting, value)
    results = []
    for by_stage in (False, True):
        twin = copy.deepcopy(layer)
        x = torch.randn(2, 9, DIM, generator=generator()).requires_grad_(training)
        torch.manual_seed(1)
        if by_stage:
            first, one, first_loss = twin.layers[0](x)
            second, two, second_loss = twin.layers[1](x - first.detach())
            quantized, indices, losses = first + second, [one, two], torch.stack([first_loss, second_loss])
        else:
            quantized, indices, losses = twin(x)
            indices = list(indices.unbind(-1))
        if training:
            (quantized.square().sum() + losses.sum()).backward()
        results.append([quantized, *indices, losses, *([x.grad] if training else [])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward"])
@pytest.mark.parametrize("kind", ["ResidualVQ", "ResidualFSQ", "ResidualLFQ", "GroupedResidualVQ", "ResidualSimVQ"])
def test_hooks_of_a_stage_are_named(kind, change):
    make = lambda: fastvq.ResidualSimVQ(dim=DIM, codebook_size=16, num_quantizers=2)  # noqa: E731
    layer = STACKS.get(kind, make)()
    stage = getattr(layer, "rvqs", [layer])[0].layers[1]
    if change == "hook":
        stage.register_forward_hook(lambda *args: None)
    elif change == "pre-hook":
        stage.register_forward_pre_hook(lambda *args: None)
    else:
        stage.forward = lambda x: (x, x, x)
    with pytest.warns(UserWarning, match="layers.1: has hooks or a forward of its own"):
        layer(torch.randn(2, 9, getattr(layer, "dim", DIM)))
