"""The searches of the adapters beside those of fastvq."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.clients.nearest import nearest, nearest_while_learning, residual_nearest, statistics


@pytest.mark.parametrize("size", [1.0, 1e3, 1e18, 1e30])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_codes_too_long_to_be_nearest_change_no_index(size, share):
    generator = torch.Generator().manual_seed(0)
    rows, codes = (torch.randn(number, 8, generator=generator) for number in (200, 64))
    codes[: int(64 * share)] *= size
    rows[0], rows[1], rows[2] = codes[0], torch.nan, torch.inf
    rows[3] = -codes[0]
    expected = fastvq.search(rows, codes).clamp_min(0)
    assert torch.equal(nearest_while_learning(rows, codes), expected)
    assert torch.equal(nearest(rows, codes), expected)
    assert expected[1] == expected[2] == 0


def test_no_rows():
    empty = torch.empty(0, 8)
    assert nearest_while_learning(empty, torch.randn(4, 8)).shape == (0,)
    assert residual_nearest(torch.empty(2, 8, 0), [torch.randn(4, 8)] * 3).shape == (3, 2, 0)


def test_residuals_and_statistics():
    generator = torch.Generator().manual_seed(0)
    x, codebooks = torch.randn(2, 8, 5, generator=generator), torch.randn(3, 16, 8, generator=generator)
    found = residual_nearest(x, list(codebooks))
    assert torch.equal(found.permute(1, 2, 0).reshape(10, 3), fastvq.residual_search(x.mT.reshape(10, 8), codebooks))
    rows = x.mT.reshape(10, 8).clone()
    rows[3, 1] = torch.nan
    counts, sums = statistics(rows, found[0].reshape(-1), 16)
    assert counts.sum() == 9
    assert sums.isfinite().all()
