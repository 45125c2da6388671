"""Searches by fastvq's backends, one by one; `fastvq bench --suite` times them beside other libraries."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.bench.data import DATA, OTHER_SHAPES, SHAPES, Shape
from fastvq.bench.exact import nearest
from fastvq.bench.measure import checked_rows
from fastvq.bench.peers import CONTESTANTS

BACKENDS = {c.name: c for c in CONTESTANTS if c.name.startswith("fastvq")}
_LARGEST_FOR_TORCH = 1 << 34  # N K D: the torch backend is an order slower


@pytest.mark.parametrize("data", ["gaussian", "clustered"])
@pytest.mark.parametrize("shape", [*SHAPES, *OTHER_SHAPES], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def bench_search(benchmark, name, shape, data):
    if name == "fastvq torch" and shape.n * shape.k * shape.d > _LARGEST_FOR_TORCH:
        pytest.skip("takes longer than a benchmark may; fastvq bench --suite times it")
    x, codebook = DATA[data](shape)
    call = BACKENDS[name].prepare(x, codebook)
    rows = checked_rows(x, codebook)
    assert torch.equal(call()[rows], nearest(x[rows], codebook))
    benchmark.group = f"search {shape} {data}"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    benchmark.extra_info["GFLOP/s"] = round(2e-9 * shape.n * shape.k * shape.d / benchmark.stats.stats.median, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", ["l2", "dot"])
def bench_dtypes_and_metrics(benchmark, dtype, metric):
    x, codebook = (t.to(dtype) for t in DATA["clustered"](SHAPES[1]))
    assert torch.equal(fastvq.search(x, codebook, metric=metric), nearest(x, codebook, metric=metric))
    benchmark.group = f"search {SHAPES[1]} by dtype and metric"
    benchmark.pedantic(fastvq.search, (x, codebook), {"metric": metric}, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("data", ["latents", "gaussian"])
@pytest.mark.parametrize("size", [1024, 2048, 8192])
def bench_two_stages(benchmark, data, size):
    """Random residuals of the first stage are the codes of the second."""
    x, first = DATA[data](Shape(16384, size, 64))
    residual = x - first[fastvq.search(x, first)]
    second = residual[torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(fastvq.residual_search(x, [first, second])[:, 1], fastvq.search(residual, second))
    benchmark.group = f"residual search, two stages of {size}"
    benchmark.pedantic(fastvq.residual_search, (x, [first, second]), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("data", ["latents", "gaussian"])
@pytest.mark.parametrize(("size", "k"), [(512, 4), (8192, 8), (8192, 32)])
def bench_ranks(benchmark, data, size, k):
    x, codes = DATA[data](Shape(4096, size, 64))
    assert torch.equal(fastvq.topk_search(x, codes, k)[:, 0], fastvq.search(x, codes))
    benchmark.group = f"the {k} nearest of {size}"
    benchmark.pedantic(fastvq.topk_search, (x, codes, k), rounds=7, warmup_rounds=1)
