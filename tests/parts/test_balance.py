"""Balanced assignment against Sinkhorn's algorithm on the whole matrix."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.parts import balanced_assignment

from ..cases import close, generator


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_it_is_sinkhorns_algorithm(metric):
    x = torch.randn(60, 4, generator=generator(), dtype=torch.float64)
    x[3, 1] = torch.nan
    codes = torch.randn(7, 4, generator=generator(1), dtype=torch.float64)
    mask = torch.arange(60) != 5
    found = balanced_assignment(x, codes, metric=metric, temperature=0.5, iterations=20, mask=mask)
    rows = x[mask & x.isfinite().all(1)]
    scores = rows @ codes.T if metric == "dot" else -torch.cdist(rows, codes).square()
    plan = (scores / 0.5).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True) / len(rows)
        plan = plan / plan.sum(0) / 7
    assert torch.equal(found.indices[mask & x.isfinite().all(1)], plan.argmax(1))
    assert found.indices[[3, 5]].tolist() == [-1, -1]
    mean = ((scores + found.bias) / 0.5).softmax(1).mean(0)
    close(found.imbalance, (7 * mean - 1).abs().amax())


def test_codes_are_used_evenly():
    """One cluster has nearly all vectors; nearest codes leave most codes without any."""
    x = torch.cat([0.1 * torch.randn(900, 8, generator=generator()), torch.randn(100, 8, generator=generator(1))])
    codes = torch.randn(20, 8, generator=generator(2))
    nearest = torch.bincount(fastvq.search(x, codes), minlength=20)
    found = balanced_assignment(x[None], codes, temperature=0.02, iterations=400)
    counts = torch.bincount(found.indices[0], minlength=20)
    assert nearest.max() > 300
    assert counts.max() < 80
    assert counts.min() > 20
    assert found.imbalance < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "distance"}, "metric: must be"),
        ({"temperature": 0.0}, "temperature: must be positive"),
        ({"iterations": 0}, "iterations: must be"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        balanced_assignment(torch.zeros(3, 2), torch.zeros(4, 2), **options)
