"""Training steps on a few vectors: the Python calls that they make, and the short path of the common case."""

from __future__ import annotations

import collections
import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastvq
from fastvq.backends import native
from fastvq.codebook.health import Health, observe_stages_

from ..cases import close
from ..contract import step
from ..layers import DIM, SIZE, batch, state

OVERHEAD = Path(__file__).parents[2] / "benchmarks" / "bench_overhead.py"


def vector_quantize(**settings):
    return fastvq.VectorQuantize(64, 512, **settings)


def residual_vq(stages=8, **settings):
    return fastvq.ResidualVQ(dim=64, num_quantizers=stages, codebook_size=256, **settings)


def overhead():
    spec = importlib.util.spec_from_file_location("bench_overhead", OVERHEAD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "files", "calls"), [("VectorQuantize", 11, 45), ("ResidualVQ", 13, 70)])
def test_a_training_step_is_short(name, files, calls):
    """Each op that a kernel serves adds one file and one call."""
    bench = overhead()
    torch.manual_seed(0)
    counted = bench.count(bench.LAYERS[name]())
    assert len(counted.without_ops().files) <= files - 4, counted.files
    if native.instruction_set():  # without the library, Python chooses a backend at every op
        assert len(counted.files) <= files, counted.files
        assert counted.calls.total() <= calls, counted.calls


PLAIN = {
    "VectorQuantize": lambda **settings: fastvq.VectorQuantize(DIM, SIZE, **settings),
    "ResidualVQ": lambda **settings: fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=SIZE, **settings),
}
SETTINGS = {
    "defaults": {},
    "straight through": {"rotation_trick": False},
    "weight": {"commitment_weight": 0.3},
    "no commitment": {"commitment_weight": 0.0},
    "frozen": {"freeze_codebook": True},
    "dead codes": {"threshold_ema_dead_code": 2},
    "k-means": {"kmeans_init": True},
    "images": {"accept_image_fmap": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_plain_path_has_the_results_of_the_general_one(name, settings, dtype, monkeypatch):
    torch.manual_seed(0)
    plain = PLAIN[name](**settings)
    general = copy.deepcopy(plain)
    taken = []
    run, decide = type(plain)._forward_plain, type(plain)._is_plain
    monkeypatch.setattr(type(plain), "_forward_plain", lambda self, *args: taken.append(self) or run(self, *args))
    monkeypatch.setattr(type(plain), "_is_plain", lambda self, *given: self is plain and decide(self, *given))
    for seed in range(4):
        x = batch(seed=seed).to(dtype)
        x = x.mT.reshape(4, DIM, 2, 5) if plain.accept_image_fmap else x
        x.flatten(2).mT[1, 3] = torch.nan if seed == 2 else 0.5
        for layer in (plain, general):
            layer.train(seed != 3)
        expected = step(general, x) if seed != 3 else (general(x), None, {})
        found = step(plain, x) if seed != 3 else (plain(x), None, {})
        for one, other in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
            assert (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one, other))
        for name, value in state(general).items():
            assert torch.equal(state(plain)[name], value), name
    assert len(taken) == (3 if "kmeans_init" in settings else 4)
    assert set(map(id, taken)) == {id(plain)}


class Passes(TorchDispatchMode):
    """Counts the ops of fastvq, and the tensors of at least `elements` elements that are made."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.ops, self.made = elements, collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "fastvq":
            self.ops[func._opname] += 1
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for result in tree_leaves(results):
            is_large = isinstance(result, torch.Tensor) and result.numel() >= self.elements
            self.made += is_large and result.untyped_storage().data_ptr() not in given
        return results


def passes(call, elements):
    call()
    with Passes(elements) as counted:
        call()
    return counted


QUANTIZE = ("search", "quantize_forward", "quantize_backward")
RESIDUAL = tuple(f"residual_{op}" for op in QUANTIZE)


@pytest.mark.parametrize(
    ("layer", "ops"),
    [
        (vector_quantize, (*QUANTIZE, "accumulate", "ema_update_")),
        (lambda: vector_quantize(freeze_codebook=True), QUANTIZE),
        (residual_vq, (*RESIDUAL, "accumulate", *["ema_update_"] * 8)),
    ],
    ids=["VectorQuantize", "frozen", "ResidualVQ"],
)
def test_a_training_step_makes_no_further_pass_over_the_vectors(layer, ops):
    layer, x = layer(), torch.randn(1, 4096, 64, requires_grad=True)
    ones = torch.ones_like(x)

    def call():
        x.grad = None
        quantized, _, loss = layer(x)
        torch.autograd.backward([quantized, loss], [ones, torch.ones_like(loss)])

    counted = passes(call, x.numel())
    assert counted.ops == collections.Counter(ops)
    # The output, what is kept of the codes or residuals, and the gradient.
    assert counted.made <= 3


@torch.no_grad()
@pytest.mark.parametrize(("layer", "search"), [(vector_quantize, "search"), (residual_vq, "residual_search")])
def test_evaluation_makes_no_further_pass_over_the_vectors(layer, search):
    layer, x = layer().eval(), torch.randn(1, 4096, 64)
    counted = passes(lambda: layer(x), x.numel())
    assert counted.ops == {search: 1, search.replace("search", "quantize_forward"): 1}
    assert counted.made == 1
    counted = passes(lambda: layer.encode(x), x.numel())
    assert counted.ops == {search: 1}
    assert counted.made == 0


@pytest.mark.parametrize("layer", [vector_quantize, residual_vq])
def test_codes_are_remembered_where_checkpointing_may_repeat_them(layer):
    layer, x = layer(), torch.randn(1, 4, 64, requires_grad=True)
    layer(x)
    assert not layer._history._passes
    for use_reentrant in (True, False):
        checkpoint(layer, x, use_reentrant=use_reentrant)
    assert len(layer._history._passes) == 2


def test_stages_are_observed_as_if_apart():
    together, apart = ([Health(5) for _ in range(3)] for _ in range(2))
    for seed, errors in enumerate(([1.0, 2.0, torch.nan], [3.0, 1.0, 4.0], [0.5, torch.nan, 1.0])):
        torch.manual_seed(seed)
        indices = torch.randint(-1, 5, (3, 1, 7))
        indices[torch.tensor(errors).isnan()] = -1
        observe_stages_(together, indices, torch.tensor(errors))
        for health, chosen, error in zip(apart, indices, errors, strict=True):
            health.observe_(chosen, torch.tensor(error))
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.code_counts, other.code_counts)
        assert torch.equal(one.weight, other.weight)
        close(one.error, other.error)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_what_is_added_to_the_loss_stays_out_of_the_breakdown(training, weight):
    layer, x = vector_quantize(commitment_weight=weight).train(training), torch.randn(1, 4, 64, requires_grad=True)
    *_, loss, breakdown = layer(x, return_loss_breakdown=True)
    before = [float(part.detach()) for part in breakdown]
    loss += 1
    assert [float(part.detach()) for part in breakdown] == before
    *_, loss = layer(x)
    loss += x.sum()
    loss.backward()
