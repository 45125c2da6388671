"""k-means in one process; tests/test_distributed.py has it over several."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

import fastvq
from fastvq.backends import reference
from fastvq.codebook import kmeans
from fastvq.codebook.candidates import spread_seeds
from fastvq.functional.quantize import unit_norm

from ..cases import close, generator


def lloyd(x, means, iterations, metric):
    """Row by row and code by code."""
    for _ in range(iterations):
        indices = reference.search(x, means, metric=metric)
        new = means.clone()
        for k in range(len(means)):
            members = x[indices == k].double()
            if len(members):
                new[k] = members.mean(0).float()
                new[k] = unit_norm(new[k]) if metric == "dot" else new[k]
        means = new
    return means, torch.bincount(indices, minlength=len(means)).float()


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_kmeans_is_lloyds_algorithm(metric, monkeypatch):
    x = torch.randn(200, 5)
    x = unit_norm(x) if metric == "dot" else x
    module = importlib.import_module("fastvq.codebook.kmeans")
    monkeypatch.setattr(module, "random_rows", lambda x, mask, count: (x[:count], torch.ones(count)))
    mask = torch.ones(200, dtype=torch.bool)
    means, counts = kmeans(x, 9, iterations=4, mask=mask, metric=metric, seeding="random")
    expected, expected_counts = lloyd(x, x[:9], 4, metric)
    close(means, expected)
    assert torch.equal(counts, expected_counts)


def test_kmeans_finds_separated_clusters():
    centers = 100 * torch.eye(4)
    x = (centers[:, None] + torch.randn(4, 50, 4)).flatten(0, 1)
    torch.manual_seed(3)
    means, counts = kmeans(x, 16, iterations=20, mask=torch.ones(200, dtype=torch.bool))
    assert counts.sum() == 200
    nearest = reference.search(x, means)
    assert (x - means[nearest]).square().sum(1).mean() < 8


def repeated(rows=1000, share=0.9, dim=8, values=1):
    """Rows of which a share has few values."""
    x = torch.randn(rows, dim, generator=generator())
    equal = int(share * rows)
    x[:equal] = torch.randn(values, dim, generator=generator(1)).repeat_interleave(-(-equal // values), 0)[:equal]
    return x[torch.randperm(rows, generator=generator(2))]


@pytest.mark.parametrize("values", [1, 10])
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_repeat_take_one_mean(values, metric, seed):
    x = repeated(values=values)
    x = unit_norm(x) if metric == "dot" else x
    torch.manual_seed(seed)
    mask = torch.ones(1000, dtype=torch.bool)
    used = int((kmeans(x, 64, iterations=10, mask=mask, metric=metric)[1] > 0).sum())
    torch.manual_seed(seed)
    random = int((kmeans(x, 64, iterations=10, mask=mask, metric=metric, seeding="random")[1] > 0).sum())
    print(f"{metric}, 900 of 1,000 rows have {values} values: k-means++ uses {used} of 64 codes, random rows {random}")
    assert used >= 60
    assert random < 45


@pytest.mark.parametrize("make", [fastvq.VectorQuantize, partial(fastvq.ResidualVQ, num_quantizers=1)])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_use_their_codes(make, compiled):
    torch._dynamo.reset()
    layer = make(dim=8, codebook_size=64, kmeans_init=True)
    (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(repeated()[None])
    layer.reset_health()
    layer(repeated()[None])
    assert layer.usage() >= 55 / 64


def test_seeds_reach_far_clusters():
    """All of 40 clusters with one row each beside a dense one get a seed; random rows miss most of them."""
    x = torch.cat(
        [0.01 * torch.randn(2000, 2, generator=generator()), 100 * torch.randn(40, 2, generator=generator(1))]
    )
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[7] = False
    x[7] = torch.nan
    rows, filled = spread_seeds(x, mask, 64, together=False)
    chosen = {tuple(row) for row in rows[filled > 0].tolist()}
    assert len(chosen) == int((filled > 0).sum()) >= 64
    assert chosen <= {tuple(row) for row in x[mask].tolist()}
    assert sum(tuple(row) in chosen for row in x[2000:].tolist()) >= 36


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-23, 1e37])
def test_seeds_of_any_magnitude(scale):
    """Squares of their distances leave the range of float32."""
    x = scale * torch.randn(500, 4, generator=generator())
    rows, filled = spread_seeds(x, torch.ones(500, dtype=torch.bool), 64, together=False)
    assert len(rows[filled > 0].unique(dim=0)) >= 64


def test_unknown_seeding():
    with pytest.raises(ValueError, match=r"^kmeans_seeding: must be one of k-means\+\+, random, got 'first'"):
        fastvq.VectorQuantize(4, 8, kmeans_seeding="first")


def test_kmeans_ignores_what_is_not_valid():
    x = torch.randn(60, 3)
    mask = torch.rand(60) < 0.5
    x[~mask] = torch.nan
    means, counts = kmeans(x, 5, iterations=3, mask=mask)
    assert bool(means.isfinite().all())
    assert counts.sum() == mask.sum()


def test_kmeans_with_fewer_rows_than_codes():
    x = torch.randn(3, 2)
    means, counts = kmeans(x, 8, iterations=2, mask=torch.ones(3, dtype=torch.bool))
    assert {tuple(m) for m in means.tolist()} == {tuple(row) for row in x.tolist()}
    assert counts.sum() == 3


def test_kmeans_without_a_valid_row_stays_finite():
    means, counts = kmeans(torch.full((4, 2), torch.nan), 3, iterations=2, mask=torch.zeros(4, dtype=torch.bool))
    assert not means.any()
    assert not counts.any()
