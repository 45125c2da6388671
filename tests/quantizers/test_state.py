"""State of every quantizer: complete from the constructor on, loadable by any route, and reset by `reinitialize_`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastvq
from fastvq.codebook.guards import guard_ready

from ..cases import generator
from ..every import QUANTIZERS, batch_for, make, tensors
from ..layers import state

DIM, SIZE = 6, 12
KMEANS = {
    "VectorQuantize": lambda: fastvq.VectorQuantize(DIM, SIZE, kmeans_init=True),
    "cosine": lambda: fastvq.VectorQuantize(DIM, SIZE, kmeans_init=True, use_cosine_sim=True),
    "learnable": lambda: fastvq.VectorQuantize(DIM, SIZE, kmeans_init=True, learnable_codebook=True),
    "ResidualVQ": lambda: fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=SIZE, kmeans_init=True),
    "shared": lambda: fastvq.ResidualVQ(
        dim=DIM, num_quantizers=2, codebook_size=SIZE, kmeans_init=True, shared_codebook=True
    ),
    "grouped": lambda: fastvq.GroupedResidualVQ(
        dim=DIM, groups=2, num_quantizers=2, codebook_size=SIZE, kmeans_init=True
    ),
    "HierarchicalVQ": lambda: fastvq.HierarchicalVQ(
        dim=DIM, codebook_size=SIZE, scales=(2, 16), channel_first=False, shared_codebook=False
    ),
}


def batch(seed=0):
    return torch.randn(4, 16, DIM, generator=generator(seed))


def codebooks(layer):
    return list(dict.fromkeys(m for m in layer.modules() if isinstance(m, fastvq.codebook.Codebook)))


def names(layer):
    return [n for n, _ in layer.named_parameters()], [n for n, _ in layer.named_buffers()], list(layer.state_dict())


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_no_state_is_born_late(kind):
    layer = make(kind)
    before = names(layer)
    layer(batch_for(kind))
    if hasattr(layer, "commit_ema_update") and kind != "in place":
        layer(batch_for(kind), accum_ema_update=True)
    assert names(layer) == before


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "ema"])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_buffers_can_be_averaged(kind, average):
    """Also while statistics are kept for a later step, and with the flag of k-means among the buffers."""
    layer = make(kind)
    model = torch.nn.ModuleList([layer, torch.nn.Linear(1, 1)])  # torch can't average a model without any state
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for seed in range(3):
        layer(batch_for(kind, seed=seed), **({"accum_ema_update": True} if "residual, k" in kind else {}))
        averaged.update_parameters(model)
    averaged.module[0].eval()(batch_for(kind))
    assert all(codebook.initted == 1 for codebook in codebooks(averaged.module))


def put_directly(layer, saved):
    """Set each tensor of the state by itself, as transformers and accelerate do."""
    for name, value in saved.items():
        place, _, own = name.rpartition(".")
        module = layer.get_submodule(place)
        if own in module._buffers:
            module._buffers[own] = value.clone()
        else:
            module._parameters[own] = torch.nn.Parameter(value.clone(), module._parameters[own].requires_grad)


@pytest.mark.parametrize("route", ["to_empty", "assign", "directly"])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_built_without_memory(kind, route):
    trained = make(kind)
    trained(batch_for(kind))
    trained.eval()
    with torch.device("meta"):
        layer = make(kind).eval()
    assert {t.device.type for t in layer.state_dict().values()} <= {"meta"}
    saved = copy.deepcopy(trained.state_dict())
    if route == "to_empty":
        poison = [torch.full((size,), torch.nan) for size in range(200)]
        del poison
        layer.to_empty(device="cpu")
    if route == "directly":
        put_directly(layer, saved)
    else:
        layer.load_state_dict(saved, assign=route == "assign")
    results = zip(tensors(layer(batch_for(kind))), tensors(trained(batch_for(kind))), strict=True)
    assert all(torch.equal(one, other) for one, other in results)
    fresh = make(kind)
    assert all(torch.equal(t, state(fresh)[name]) for name, t in state(layer).items() if "_health" in name)
    torch.manual_seed(1)
    layer.train()(batch_for(kind, seed=1))  # k-means doesn't run again
    for name, t in trained.state_dict().items():
        if name.endswith("initted"):
            assert torch.equal(layer.state_dict()[name], t)


def write(how, initted):
    if how == "fill_":
        initted.fill_(False)
    elif how == "data":
        initted.data.copy_(torch.tensor(False))
    else:
        initted.numpy()[...] = 0


@pytest.mark.parametrize("how", ["fill_", "data", "numpy", "load", "replace"])
@pytest.mark.parametrize("kind", KMEANS)
def test_kmeans_runs_again_when_initted_is_false(kind, how):
    """As in vector_quantize_pytorch, whoever has written to it."""
    layer = KMEANS[kind]()
    fresh = copy.deepcopy(layer.state_dict())
    layer(batch())
    for codebook in codebooks(layer):
        with torch.no_grad():
            codebook.embed.fill_(7)
    if how == "load":
        layer.load_state_dict(fresh)
    elif how == "replace":
        for codebook in codebooks(layer):
            codebook.initted = torch.tensor(False)
    else:
        for codebook in codebooks(layer):
            write(how, codebook.initted)
    layer.eval()(batch())  # nothing learns in eval
    assert not any(bool(codebook.initted) for codebook in codebooks(layer))
    layer.train()(batch())
    for codebook in codebooks(layer):
        assert bool(codebook.initted)
        assert (codebook.embed != 7).all()
        assert codebook.embed.any()


@pytest.mark.parametrize(("kind", "how"), [("VectorQuantize", "fill_"), ("ResidualVQ", "data")])
def test_a_compiled_layer_sees_what_is_written_to_initted(kind, how):
    """At the same step as an eager one, in both directions, without a graph more than one for each answer."""
    torch._dynamo.reset()
    counters.clear()
    eager = KMEANS[kind]()
    for codebook in codebooks(eager):
        codebook.kmeans_iters = 1  # which are unrolled
        codebook.initted.fill_(True)
        assert codebook.ready()  # before the first graph is compiled, which is for False again
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for step in range(6):
        if step in (0, 2, 4):
            for one in (eager, layer):
                write(how, codebooks(one)[-1].initted)
        if step == 4:  # before k-means runs, somebody puts codes into place
            for one in (eager, layer):
                codebooks(one)[-1].embed.fill_(0.5)
                codebooks(one)[-1].initted.fill_(True)
        for one, own in ((eager, eager), (compiled, layer)):
            torch.manual_seed(step)
            before = codebooks(own)[-1].embed.clone()
            one(10**step * batch(step))
            assert step != 2 or not torch.allclose(codebooks(own)[-1].embed, before, rtol=1)
        for name, t in eager.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], t, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_torch_with_other_guards_is_told_of():
    with pytest.warns(UserWarning, match="initted: torch .* has other guards than expected"):
        guard_ready(object())


WITH_CODEBOOK = {
    "VectorQuantize": lambda: fastvq.VectorQuantize(DIM, SIZE, threshold_ema_dead_code=1),
    "reservoir": lambda: fastvq.VectorQuantize(DIM, SIZE, replacement=fastvq.Replacement(1.0, reservoir=32, every=2)),
    "affine": lambda: fastvq.VectorQuantize(DIM, SIZE, affine_param=True),
    **KMEANS,
    "RandomProjectionQuantizer": lambda: fastvq.RandomProjectionQuantizer(dim=DIM, codebook_size=SIZE, codebook_dim=4),
    "SimVQ": lambda: fastvq.SimVQ(DIM, SIZE),
    "ResidualSimVQ": lambda: fastvq.ResidualSimVQ(dim=DIM, num_quantizers=2, codebook_size=SIZE),
    "LatentQuantize": lambda: fastvq.LatentQuantize([5, 4, 3], DIM),
    "Sequential": lambda: fastvq.Sequential(torch.nn.Linear(DIM, DIM), fastvq.VectorQuantize(DIM, SIZE)),
}


@pytest.mark.parametrize("kind", WITH_CODEBOOK)
def test_reinitialize(kind):
    layer = WITH_CODEBOOK[kind]()
    new = state(layer)
    x = batch().mT if kind == "LatentQuantize" else batch()
    for _ in range(2):
        layer(x)
    if kind == "LatentQuantize":
        with torch.no_grad():
            for values in layer.values_per_latent:
                values.add_(0.1)
    used = state(layer)
    layer.reinitialize_()
    for name, t in state(layer).items():
        if name.endswith(("embed", "embed_avg", "frozen_codebook")) and new[name].any():
            assert not torch.equal(t, new[name])  # drawn anew
            assert 0.5 < t.std() / new[name].std() < 2
            assert not torch.equal(t, used[name])
        else:
            assert torch.equal(t, new[name]), name
    torch.manual_seed(3)
    layer.reinitialize_()
    once = state(layer)
    torch.manual_seed(3)
    layer.reinitialize_()
    assert all(torch.equal(t, once[name]) for name, t in state(layer).items())
    layer(x)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_health_of_training_and_of_an_evaluation(kind):
    """Evaluating changes no counts of training, unless it is measured."""
    layer = make(kind)
    layer(batch_for(kind))
    trained = layer.health()
    counts = layer.code_counts.clone()
    layer.eval()(batch_for(kind, seed=1))
    assert torch.equal(layer.code_counts, counts)
    torch.testing.assert_close(layer.health(), trained, equal_nan=True, rtol=0, atol=0)
    layer.reset_health()
    layer(batch_for(kind))
    assert all(value.isnan().all() for value in layer.health()[:4])
    with layer.measuring():
        layer(batch_for(kind))
    layer(batch_for(kind, seed=1))
    report = layer.health()
    assert all(value.isfinite().all() for value in report)
    assert (report.usage > 0).all()
    assert (report.perplexity >= 1).all()
