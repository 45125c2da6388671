"""k-means in one process; tests/test_distributed.py has it over several."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastvq.backends import reference
from fastvq.codebook import kmeans
from fastvq.functional.quantize import unit_norm

from ..cases import close


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
    means, counts = kmeans(x, 9, iterations=4, mask=mask, metric=metric)
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
