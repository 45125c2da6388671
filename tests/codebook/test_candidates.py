"""Rows that codes may be set to: random ones, spread ones, and those of a reservoir."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.codebook.candidates import Reservoir, compacted, random_rows, spread_rows

from ..cases import generator


@pytest.mark.parametrize(("rows", "available", "count"), [(10, 10, 10), (10, 6, 4), (50, 20, 7), (1, 1, 1), (3, 2, 8)])
def test_random_rows_are_valid_and_distinct(rows, available, count):
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.randperm(rows)[:available]] = True
    x = torch.arange(rows).float()[:, None]
    x[~mask] = torch.nan
    chosen, filled = random_rows(x, mask, count)
    expected = min(available, count)
    assert chosen.shape == (count, 1)
    assert filled.sum() == expected
    assert bool(mask[chosen[filled > 0, 0].long()].all())
    assert len(chosen[filled > 0].unique()) == expected
    assert not chosen[filled == 0].any()


def test_random_rows_are_random():
    x, mask = torch.arange(100).float()[:, None], torch.ones(100, dtype=torch.bool)
    assert not torch.equal(random_rows(x, mask, 9)[0], random_rows(x, mask, 9)[0])


def test_compacted():
    rows, filled = torch.arange(5.0)[:, None], torch.tensor([0.0, 1, 0, 1, 1])
    kept, available = compacted((rows, filled))
    assert available == 3
    assert kept[:3, 0].tolist() == [1, 3, 4]


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_spread_rows_reach_every_far_cluster(metric):
    """Uniform rows would nearly all be of the large cluster that has a code already."""
    g = generator()
    centers = torch.eye(6)
    sizes = [500, 2, 2, 2, 2, 2]
    x = torch.cat([center + 0.001 * torch.randn(n, 6, generator=g) for center, n in zip(centers, sizes, strict=True)])
    x = torch.nn.functional.normalize(x, dim=1) if metric == "dot" else x
    rows, filled = spread_rows(x, torch.ones(len(x), dtype=torch.bool), centers[:1], 5, metric)
    assert filled.sum() == 5
    assert reference.search(rows, centers, metric=metric).sort().values.tolist() == [1, 2, 3, 4, 5]


def test_spread_rows_are_drawn_by_squared_distance():
    x = torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    mask = torch.tensor([True, True, False, True])
    torch.manual_seed(0)
    picks = torch.stack([spread_rows(x, mask, torch.zeros(1, 1), 1, "l2")[0][0, 0] for _ in range(2000)])
    assert set(picks.tolist()) == {1.0, 2.0}
    assert abs((picks == 2).float().mean() - 0.8) < 0.03  # 4 in 5; the error of 2000 draws is 0.009


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e19, 1e37])
def test_spread_rows_of_any_magnitude(scale):
    """Distances whose squares leave the range of float32 are drawn from like others."""
    x = torch.cat([torch.zeros(60, 4), 3 * torch.eye(4)]) + 0.01 * torch.randn(64, 4, generator=generator())
    torch.manual_seed(0)
    rows, filled = spread_rows(scale * x, torch.ones(64, dtype=torch.bool), scale * x[:1], 4, "l2")
    assert filled.sum() == 4
    assert reference.search(rows, scale * x[-4:]).sort().values.tolist() == [0, 1, 2, 3]


def test_spread_rows_stop_where_all_are_codes():
    x = torch.randn(4, 3)
    rows, filled = spread_rows(x, torch.ones(4, dtype=torch.bool), x[:2], 4, "l2")
    assert filled.tolist() == [1, 1, 0, 0]
    assert {tuple(r) for r in rows[:2].tolist()} == {tuple(r) for r in x[2:].tolist()}
    assert not spread_rows(x[:0], torch.ones(0, dtype=torch.bool), x, 3, "l2")[1].any()


def test_a_reservoir_keeps_recent_rows():
    reservoir = Reservoir(8, 1)
    reservoir.add_(torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False]))
    assert reservoir.filled.tolist() == [True] + [False] * 7
    for step in range(2, 12):
        reservoir.add_(torch.full((5, 1), float(step)), torch.ones(5, dtype=torch.bool))
    assert sorted(reservoir.rows[:, 0].tolist()) == [8, 8, 9, 9, 10, 10, 11, 11]
    assert not reservoir.state_dict()
