"""min_distance_ of csrc/cuda, in the emulator."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference

from ..cases import DTYPES, generator
from . import emulation
from .emulation import ORDERS, run


def lowered():
    """(distances, x, codes): lanes for each row from 1 to 32, rows that end within a warp, a block and several."""
    g = generator()
    for dtype in DTYPES:
        for n, m, d in [
            (1, 1, 1),
            (9, 2, 3),
            (70, 1, 8),
            (300, 3, 33),
            (65, 1, 128),
            (20, 2, 131),
            (0, 1, 4),
            (5, 0, 4),
        ]:
            x, codes = torch.randn(n, d, generator=g).to(dtype), torch.randn(m, d, generator=g)
            yield 2 * d * torch.rand(n, generator=g), x, codes.to(dtype) if m == 2 else codes
    x, codes = torch.randn(40, 6, generator=g), torch.randn(2, 6, generator=g)
    x[3, 2], x[7, 0], codes[1, 5] = torch.nan, torch.inf, torch.nan
    yield torch.full((40,), torch.inf), x, codes
    yield torch.full((40,), 1.5).index_fill(0, torch.tensor([3, 7, 9]), 0.0), x, codes
    yield torch.full((40,), torch.nan), x, codes
    # More rows than the device has blocks.
    yield torch.full((7000,), 3.0), torch.randn(7000, 2, generator=g), torch.randn(1, 2, generator=g)


@pytest.mark.parametrize("order", ORDERS)
def test_min_distance(order):
    given = list(lowered())
    answers = run((emulation.min_distance(*case) for case in given), order=order, seed=7)
    for (distances, x, codes), (found,) in zip(given, answers, strict=True):
        expected = distances.clone()
        reference.min_distance_(expected, x, codes)
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1)), (x.shape, codes.shape, x.dtype)


def test_rows_without_a_distance_to_lower_are_not_read():
    """Memory that ends before their elements: AddressSanitizer would see it, and so does a NaN."""
    distances = torch.tensor([0.0, 4.0, 0.0])
    x = torch.tensor([[torch.nan], [1.0], [torch.nan]])
    ((found,),) = run([emulation.min_distance(distances, x, torch.zeros(1, 1))])
    assert found.tolist() == [0.0, 1.0, 0.0]
