"""Times of the ops of a training step besides the search, by the native and the torch backend."""

from __future__ import annotations

import functools

import pytest
import torch

import fastvq
from fastvq import ops
from fastvq.backends import reference
from fastvq.backends.torch.residual_search import search_stages
from fastvq.bench.data import Shape, clustered
from fastvq.bench.training import RESIDUAL_STEP, STAGES, STEPS
from fastvq.codebook.candidates import spread_rows

BACKENDS = ("native", "torch")


def timed(benchmark, backend, group, call):
    benchmark.group = group
    with fastvq.use_backend(backend):
        benchmark.pedantic(call, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("shape", STEPS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
class BenchOps:
    def bench_quantize_forward(self, benchmark, backend, shape):
        x, codebook = clustered(shape)
        indices = fastvq.search(x, codebook)
        call = functools.partial(ops.quantize_forward, x, codebook, indices, True)
        assert torch.equal(call()[0], codebook[indices])
        timed(benchmark, backend, f"quantize_forward {shape}", call)

    @pytest.mark.parametrize("gradient", ["ste", "rotation"])
    def bench_quantize_backward(self, benchmark, backend, shape, gradient):
        x, codebook = clustered(shape)
        indices = fastvq.search(x, codebook)
        arguments = (x, codebook[indices], indices, torch.randn_like(x), torch.ones(()))
        options = {"gradient": gradient, "commitment_weight": 0.25}
        call = functools.partial(ops.quantize_backward, *arguments, **options)
        torch.testing.assert_close(call(), reference.quantize_backward(*arguments, **options))
        timed(benchmark, backend, f"quantize_backward {gradient} {shape}", call)

    def bench_accumulate(self, benchmark, backend, shape):
        x, codebook = clustered(shape)
        indices = fastvq.search(x, codebook)
        call = functools.partial(fastvq.accumulate, x, indices, shape.k)
        torch.testing.assert_close(call(), reference.accumulate(x, indices, shape.k))
        timed(benchmark, backend, f"accumulate {shape}", call)

    def bench_ema_update(self, benchmark, backend, shape):
        x, codebook = clustered(shape)
        counts, sums = fastvq.accumulate(x, fastvq.search(x, codebook), shape.k)
        state = (codebook.clone(), torch.ones(shape.k), codebook.clone(), counts, sums)
        options = {"decay": 0.99, "eps": 1e-5}
        ours, expected = [t.clone() for t in state], [t.clone() for t in state]
        fastvq.ema_update_(*ours, **options)
        reference.ema_update_(*expected, **options)
        torch.testing.assert_close(ours, expected)
        timed(benchmark, backend, f"ema_update_ {shape}", functools.partial(fastvq.ema_update_, *state, **options))

    def bench_min_distance(self, benchmark, backend, shape):
        x, _ = clustered(shape)
        distances, expected = torch.full((shape.n,), torch.inf), torch.full((shape.n,), torch.inf)
        call = functools.partial(fastvq.min_distance_, distances, x, x[:1].clone())
        call()
        reference.min_distance_(expected, x, x[:1])
        torch.testing.assert_close(distances, expected)
        timed(benchmark, backend, f"min_distance_ {shape}", call)


@pytest.mark.parametrize("backend", BACKENDS)
def bench_spread_rows(benchmark, backend, draws=64):
    """Time draws of k-means++, each of which takes random numbers and a pass over x."""
    x, codebook = clustered(STEPS[0])
    mask = torch.ones(len(x), dtype=torch.bool)
    call = functools.partial(spread_rows, x, mask, codebook, draws, "l2")
    rows, filled = call()
    assert bool(filled.all())
    assert len(rows.unique(dim=0)) == draws
    timed(benchmark, backend, f"{draws} draws of k-means++ {STEPS[0]}", call)


def quantize_stages(x, codebooks, indices):
    """Return what `residual_quantize_forward` returns and the gradient of x, by one `quantize` a stage."""
    residual, quantized, grad = x, torch.zeros_like(x), torch.zeros_like(x)
    stages, errors, residuals = [], [], []
    for codebook, stage in zip(codebooks, indices.unbind(1), strict=True):
        codes, kept, error = ops.quantize_forward(residual, codebook, stage, True)
        stages.append((residual, kept, stage))
        errors.append(error)
        residuals.append(residual)
        residual, quantized = residual - codes, quantized + codes
    for stage, error in zip(stages, errors, strict=True):
        grad += ops.quantize_backward(*stage, quantized, error, gradient="rotation", commitment_weight=1.0)
    return quantized, torch.stack(errors), torch.stack(residuals), grad


def residual_quantize(x, codebooks, indices):
    quantized, errors, residuals = ops.residual_quantize_forward(x, codebooks, indices, True)
    options = {"gradient": "rotation", "commitment_weight": 1.0}
    grad = ops.residual_quantize_backward(x, codebooks, indices, quantized, errors, **options)
    return quantized, errors, residuals, grad


@pytest.mark.parametrize("call", [residual_quantize, quantize_stages], ids=["one pass", "stage by stage"])
def bench_residual_quantize(benchmark, call):
    """Time lookup, losses, residuals and gradient of all stages."""
    x, codebook = clustered(RESIDUAL_STEP)
    codebooks = torch.stack([codebook * 0.5**stage for stage in range(STAGES)])
    indices = fastvq.residual_search(x, codebooks)
    step = functools.partial(call, x, codebooks, indices)
    torch.testing.assert_close(step()[:3], reference.residual_quantize_forward(x, codebooks, indices, True))
    timed(benchmark, "native", f"residual_quantize, forward and backward, {STAGES} stages {RESIDUAL_STEP}", step)


@pytest.mark.parametrize("shape", [RESIDUAL_STEP, Shape(64, 1024, 128), Shape(1, 1024, 128)], ids=str)
@pytest.mark.parametrize("name", ["one pass", "stage by stage"])
def bench_residual_search(benchmark, name, shape):
    x, codebook = clustered(shape)
    codebooks = torch.stack([codebook * 0.5**stage for stage in range(STAGES)])
    by_stage = functools.partial(search_stages, fastvq.search, x, codebooks)
    call = functools.partial(fastvq.residual_search, x, codebooks) if name == "one pass" else by_stage
    assert torch.equal(call(), by_stage())
    timed(benchmark, "native", f"residual_search {STAGES} stages {shape}", call)
