"""Numbers that differ at each call of a compiled layer: two graphs serve all values, in one graph each."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import fastvq

from ..cases import close, generator
from ..every import tensors

vq = partial(fastvq.VectorQuantize, 6, 12)
rvq = partial(fastvq.ResidualVQ, dim=6, num_quantizers=2, codebook_size=12)
sampled = {"stochastic_sample_codes": True}
gumbel = sampled | {"straight_through": True, "learnable_codebook": False, "route_gradients_to_input": False}
scales = partial(fastvq.HierarchicalVQ, dim=6, codebook_size=12, scales=(1, 8), channel_first=False, kmeans_init=False)

ARGUMENTS = {
    "inv_temperature": (partial(fastvq.LFQ, codebook_size=64), "inv_temperature"),
    "temperature": (partial(fastvq.BinaryMapper, 6), "temperature"),
    "sample_codebook_temp": (partial(vq, **sampled), "sample_codebook_temp"),
    "sample_codebook_temp, Gumbel": (partial(vq, **gumbel), "sample_codebook_temp"),
    "sample_codebook_temp, residual": (partial(rvq, **sampled), "sample_codebook_temp"),
    "ema_update_weight": (vq, "ema_update_weight"),
}
ATTRIBUTES = {
    "decay": (vq, "decay"),
    "decay, residual": (rvq, "decay"),
    "eps": (vq, "_codebook.eps"),
    "commitment_weight from zero": (partial(vq, commitment_weight=0.0), "commitment_weight"),
    "batch_decay": (partial(vq, affine_param=True), "_codebook.affine.batch_decay"),
    "commitment_weight": (vq, "commitment_weight"),
    "codebook_weight": (partial(vq, learnable_codebook=True, codebook_weight=0.5), "codebook_weight"),
    "sample_codebook_temp": (partial(vq, **sampled), "sample_codebook_temp"),
    "codebook_diversity_temperature": (
        partial(vq, codebook_diversity_loss_weight=0.1), "codebook_diversity_temperature"
    ),
    "codebook_diversity_loss_weight": (
        partial(vq, codebook_diversity_loss_weight=0.1), "codebook_diversity_loss_weight"
    ),
    "orthogonal_reg_weight": (partial(vq, orthogonal_reg_weight=0.1), "orthogonal_reg_weight"),
    "directional_reparam_variance": (
        partial(vq, directional_reparam=True, threshold_ema_dead_code=1), "directional_reparam_variance"
    ),
    "entropy_loss_weight": (partial(fastvq.LFQ, codebook_size=64), "entropy_loss_weight"),
    "noise_dropout": (
        partial(fastvq.FSQ, [5, 4, 3, 3, 3, 3], preserve_symmetry=True, noise_dropout=0.5), "noise_dropout"
    ),
    "quantize_rate": (partial(fastvq.FSP, [5, 4, 3, 3, 3, 3], quantize_rate=0.5), "quantize_rate"),
    "nested_dropout": (partial(scales, nested_dropout=0.5), "nested_dropout"),
}  # fmt: skip
VALUES = (0.9, 0.8, 0.7, 0.6)


def batch(seed=0):
    return torch.randn(2, 8, 6, generator=generator(seed))


def run(layer, x, seed, **forward):
    torch.manual_seed(seed)
    return [t.detach() for t in tensors(layer(x, **forward))]


def assert_two_graphs(layer, call, backend="eager"):
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for seed, value in enumerate(VALUES):
        ours, expected = call(compiled, twin, value, seed), call(layer, layer, value, seed)
        for one, other in zip(ours, expected, strict=True):
            close(one, other)
    assert counters["stats"]["unique_graphs"] <= 2
    for name, value in layer.state_dict().items():
        close(twin.state_dict()[name], value)


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments(kind):
    torch.manual_seed(0)
    make, name = ARGUMENTS[kind]
    assert_two_graphs(make(), lambda run_by, own, value, seed: run(run_by, batch(seed), seed, **{name: value}))


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes(kind):
    torch.manual_seed(0)
    make, name = ATTRIBUTES[kind]

    def call(run_by, own, value, seed):
        place, _, attribute = name.rpartition(".")
        for part in place.split(".") if place else ():
            own = own[int(part)] if part.isdigit() else getattr(own, part)
        setattr(own, attribute, value)
        return run(run_by, batch(seed), seed)

    assert_two_graphs(make(), call)


def test_the_threshold_of_dead_codes():
    torch.manual_seed(0)

    def call(run_by, own, value, seed):
        own._codebook.replacer.policy = fastvq.Replacement(value, size=2 * value)
        return run(run_by, batch(seed), seed)

    assert_two_graphs(vq(threshold_ema_dead_code=1.0), call)


def ema(**numbers):
    codes, sizes, averages = CODES.clone(), torch.ones(12), CODES.clone()
    fastvq.ema_update_(codes, sizes, averages, SIZES, CODES, **{"decay": 0.9, "eps": 1e-5} | numbers)
    return codes


X, CODES, CHOSEN = batch()[0].requires_grad_(), torch.randn(12, 6, generator=generator(1)), torch.arange(8)
SIZES = torch.arange(12.0)
FUNCTIONS = {
    "quantize": lambda v: fastvq.quantize(X, CODES, commitment_weight=v, codebook_weight=2 * v).loss,
    "ema_update_": lambda v: ema(decay=v, eps=v / 10),
    "sample": lambda v: fastvq.sample(X, CODES, temperature=v, seed=torch.tensor(3)),
    "soft_assign": lambda v: fastvq.soft_assign(X, CODES, metric="l2", scale=v).entropy,
    "cross_entropy": lambda v: fastvq.cross_entropy(X, CODES, CHOSEN, scale=v),
    "soft_lookup": lambda v: fastvq.soft_lookup(X, CODES, CHOSEN, metric="l2", scale=v),
    "binary_assign": lambda v: fastvq.binary_assign(X, scale=v).mean,
    "entropy_loss": lambda v: fastvq.parts.entropy_loss(X, CODES, temperature=v, gamma=2 * v),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    """Values and gradients of changing numbers, in two graphs, and of tensors."""
    torch._dynamo.reset()
    counters.clear()

    def results(function, value):
        found = function(value)
        grads = torch.autograd.grad(found.sum(), X) if found.requires_grad else ()
        return [found.detach().float(), *grads]

    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")
    for value in VALUES[:3]:
        expected = results(FUNCTIONS[name], value)
        for given in (results(compiled, value), results(FUNCTIONS[name], torch.tensor(value))):
            for one, other in zip(given, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kind", ["sample_codebook_temp", "ema_update_weight"])
def test_arguments_of_traced_operations(kind):
    """AOTAutograd, which the default backend builds on, looks into the operations and may specialize a number there."""
    torch.manual_seed(0)
    make, name = ARGUMENTS[kind]
    call = lambda run_by, own, value, seed: run(run_by, batch(seed), seed, **{name: value})  # noqa: E731
    assert_two_graphs(make(), call, backend="aot_eager")


@pytest.mark.parametrize("kind", ["inv_temperature", "sample_codebook_temp", "ema_update_weight"])
def test_tensors_need_one_graph(kind):
    """And give the results of the number."""
    torch.manual_seed(0)
    make, name = ARGUMENTS[kind]
    layer = make()
    for value in VALUES:
        given = torch.tensor(value, dtype=torch.float64)
        one, other = (run(copy.deepcopy(layer), batch(), 0, **{name: each}) for each in (given, value))
        for mine, expected in zip(one, other, strict=True):
            close(mine, expected)
    counters.clear()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for value in VALUES:
        run(compiled, batch(), 0, **{name: torch.tensor(value)})
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["decay", "commitment_weight", "sample_codebook_temp"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: fastvq.ResidualVQ(dim=4, num_quantizers=3, codebook_size=8),
        lambda: fastvq.SplitResidualVQ(dim=4, num_quantizers=3, num_semantic=1, codebook_size=8),
        lambda: fastvq.GroupedResidualVQ(dim=4, groups=2, num_quantizers=2, codebook_size=8),
        lambda: fastvq.HierarchicalVQ(dim=4, codebook_size=8, scales=(1, 2), shared_codebook=False),
        lambda: fastvq.Sequential(torch.nn.Identity(), fastvq.VectorQuantize(4, 8)),
    ],
)
def test_a_setting_of_all_stages_is_assigned_to_each(layer, name):
    module = layer()
    setattr(module, name, 0.25)
    stages = [part for part in module.modules() if isinstance(part, fastvq.VectorQuantize)]
    assert getattr(module, name) == 0.25
    assert [getattr(stage, name) for stage in stages] == [0.25] * len(stages)
    assert stages
