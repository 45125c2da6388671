"""accumulate of csrc/cuda, in the emulator."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference

from ..cases import DTYPES, large_rows, one_code, skewed, skipped, uniform
from . import emulation
from .emulation import ORDERS, Failed, run

PIECE = 256


def borders():
    """Codes that end at the border of a piece, one before it and one after."""
    for first in (PIECE - 1, PIECE, PIECE + 1):
        for second in (PIECE, 2 * PIECE - 1, 2 * PIECE + 1):
            for before in (0, 1):
                yield torch.tensor([-1, 0, 2, 3]).repeat_interleave(torch.tensor([before, first, second, 1])), 5


def accumulations():
    for dtype in DTYPES:
        for kind in (uniform, one_code, skipped, skewed):
            for n, k, d in [(1, 1, 1), (17, 31, 3), (300, 7, 70), (2 * PIECE + 5, 3, 5), (0, 5, 3)]:
                yield large_rows(n, d, dtype), kind(n, k), k
    for indices, size in borders():
        yield large_rows(len(indices), 2), indices, size
    # More than one segment a block and several blocks; one digit of the key and more.
    yield large_rows(5000, 1), uniform(5000, 300), 300
    yield large_rows(3 * PIECE, 129), skewed(3 * PIECE, 255), 255
    yield large_rows(3 * PIECE, 4), skewed(3 * PIECE, 256), 256


@pytest.mark.parametrize("order", ORDERS)
def test_accumulate(order):
    given = list(accumulations())
    for (x, indices, size), (counts, sums) in zip(
        given, run((emulation.accumulate(*case) for case in given), order=order, seed=3), strict=True
    ):
        expected = reference.accumulate(x, indices, size)
        assert torch.equal(counts, expected[0])
        assert torch.equal(sums, expected[1]), (x.shape, x.dtype, size)


def test_sums_are_rounded_once():
    """In float32 the ones would vanish beside 2^25."""
    x = torch.tensor([2.0**25, *[1.0] * (2 * PIECE), -(2.0**25)])[:, None]
    ((_, sums),) = run([emulation.accumulate(x, torch.zeros(len(x), dtype=torch.int64), 1)])
    assert sums.item() == 2 * PIECE


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_an_index_out_of_range_is_an_assertion(bad):
    with pytest.raises(Failed, match=r"assertion: indices: must lie in \[-1, K\)"):
        run([emulation.accumulate(large_rows(3, 2), torch.tensor([0, bad, 1]), 4)])
