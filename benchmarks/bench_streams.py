"""Operations over all distances, by the backends that have them; each result is checked first."""

from __future__ import annotations

import functools

import pytest
import torch

import fastvq
from fastvq import ops
from fastvq.bench.data import Shape, clustered

SHAPES = [Shape(8192, 1024, 64), Shape(8192, 8192, 16)]
BACKENDS = ("native", "torch")


def timed(benchmark, backend, group, call):
    benchmark.group = group
    with fastvq.use_backend(backend):
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
class BenchStreams:
    @pytest.mark.parametrize("k", [8, 32])
    def bench_topk_search(self, benchmark, backend, shape, k):
        x, codebook = clustered(shape)
        call = functools.partial(fastvq.topk_search, x, codebook, k)
        with fastvq.use_backend(backend):
            assert torch.equal(call()[:, 0], fastvq.search(x, codebook))
        timed(benchmark, backend, f"topk_search k={k} {shape}", call)

    def bench_sample(self, benchmark, backend, shape):
        x, codebook = clustered(shape)
        call = functools.partial(fastvq.sample, x, codebook, temperature=1.0, seed=torch.tensor(1))
        with fastvq.use_backend(backend):
            few = fastvq.sample(x[:64], codebook, temperature=1.0, seed=torch.tensor(1))
        with fastvq.use_backend("reference"):
            assert torch.equal(few, fastvq.sample(x[:64], codebook, temperature=1.0, seed=torch.tensor(1)))
        timed(benchmark, backend, f"sample {shape}", call)

    def bench_soft_assign(self, benchmark, backend, shape):
        """Forward and backward, all three results."""
        x, codebook = clustered(shape)
        options = {"metric": "distance", "scale": 1.0, "floor": 1e-5}
        needs = {"need_x": True, "need_codebook": True}

        def step(rows):
            results = ops.soft_assign_forward(rows, codebook, None, **options, statistics=True)
            ones = [torch.ones_like(result) for result in results]
            return ops.soft_assign_backward(rows, codebook, None, results[0], *ones, None, **options, **needs)

        few = x[None, :64]
        with fastvq.use_backend("reference"):
            expected = step(few)
        with fastvq.use_backend(backend):
            torch.testing.assert_close(step(few), expected, rtol=1e-3, atol=1e-4)
        timed(benchmark, backend, f"soft_assign, forward and backward {shape}", functools.partial(step, x[None]))


def bench_binary_assign(benchmark):
    """By torch, which alone has it on the CPU."""
    x = torch.randn(4096, 18, requires_grad=True)

    def step():
        entropy, mean = fastvq.binary_assign(x, scale=2.0, floor=1e-5)
        return torch.autograd.grad(entropy.mean() + mean.square().sum(), x)

    assert step()[0].isfinite().all()
    timed(benchmark, "torch", "binary_assign, forward and backward, N=4096 K=262144", step)
