"""What a training step consists of besides the search, by the native and the torch backend."""

from __future__ import annotations

import functools

import pytest
import torch

import fastvq
from fastvq import ops
from fastvq.backends import reference
from fastvq.backends.torch.residual_search import search_stages
from fastvq.bench.data import Shape, clustered
from fastvq.bench.training import LEVELS, RESIDUAL_STEP, STEPS
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
    """k-means++: each draw takes random numbers and a pass over x."""
    x, codebook = clustered(STEPS[0])
    mask = torch.ones(len(x), dtype=torch.bool)
    call = functools.partial(spread_rows, x, mask, codebook, draws, "l2")
    rows, filled = call()
    assert bool(filled.all())
    assert len(rows.unique(dim=0)) == draws
    timed(benchmark, backend, f"{draws} draws of k-means++ {STEPS[0]}", call)


@pytest.mark.parametrize("name", ["one pass", "level by level"])
def bench_residual_quantize(benchmark, name):
    """Lookup, losses, residuals and gradient of all levels."""
    x, codebook = clustered(RESIDUAL_STEP)
    codebooks = torch.stack([codebook * 0.5**level for level in range(LEVELS)])
    indices = fastvq.residual_search(x, codebooks)
    call = {"one pass": ops.residual_quantize_forward, "level by level": reference.residual_quantize_forward}[name]
    back = {"one pass": ops.residual_quantize_backward, "level by level": reference.residual_quantize_backward}[name]

    def step():
        quantized, errors, residuals = call(x, codebooks, indices, True)
        grad = back(x, codebooks, indices, quantized, errors, gradient="rotation", commitment_weight=1.0)
        return quantized, errors, residuals, grad

    expected = reference.residual_quantize_forward(x, codebooks, indices, True)
    torch.testing.assert_close(step()[:3], expected)
    timed(benchmark, "native", f"residual_quantize, forward and backward, {LEVELS} levels {RESIDUAL_STEP}", step)


@pytest.mark.parametrize("shape", [RESIDUAL_STEP, Shape(64, 1024, 128), Shape(1, 1024, 128)], ids=str)
@pytest.mark.parametrize("name", ["one pass", "level by level"])
def bench_residual_search(benchmark, name, shape):
    x, codebook = clustered(shape)
    codebooks = torch.stack([codebook * 0.5**level for level in range(LEVELS)])
    by_level = functools.partial(search_stages, fastvq.search, x, codebooks)
    call = functools.partial(fastvq.residual_search, x, codebooks) if name == "one pass" else by_level
    assert torch.equal(call(), by_level())
    timed(benchmark, "native", f"residual_search {LEVELS} levels {shape}", call)
