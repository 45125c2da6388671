"""Nearest-code search against what torch offers for it, and against the bare matrix product."""

from __future__ import annotations

import functools

import pytest
import torch

from .cases import DATA, SEARCHES, SHAPES, mismatches


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*SEARCHES, "torch.mm alone"])
def bench_search(benchmark, name, shape, data):
    x, codebook = DATA[data](*shape)
    n, k, d = shape
    benchmark.group = f"search N={n} K={k} D={d} {data}"
    if name == "torch.mm alone":
        run = functools.partial(torch.mm, x, codebook.T, out=torch.empty(n, k))
    else:
        wrong = mismatches(SEARCHES[name], x, codebook)
        assert not (name.startswith("fastvq") and wrong)
        benchmark.extra_info["wrong indices of 256"] = wrong
        run = functools.partial(SEARCHES[name], x, codebook)
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    benchmark.extra_info["GFLOP/s"] = round(2e-9 * n * k * d / benchmark.stats.stats.median, 1)
