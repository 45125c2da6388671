"""The rotation estimator's arithmetic, a row at a time: fastvq/backends/reference/quantize.py has the formula."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.backends import arithmetic

SHORTEST = tl.constexpr(arithmetic.SHORTEST)


GIANT = tl.constexpr(2.0**60)
SHRINK = tl.constexpr(2.0**-80)


@triton.jit
def shrink_of(largest):
    """Return the factor of rows with these largest magnitudes, such that squares don't overflow: a power of two."""
    return tl.where(largest > GIANT, SHRINK, 1.0).to(largest.dtype)


@triton.jit
def length_of(squares):
    """Return the square root, correctly rounded."""
    if squares.dtype == tl.float64:
        length = tl.sqrt(squares)
    else:
        length = tl.sqrt_rn(squares)
    return length


@triton.jit
def unit_of(rows, lengths):
    """Return rows of unit length.

    A row of one element becomes exactly 1 or -1, so that opposite rows cancel: hence the rounded root and quotient.
    """
    divisor = tl.broadcast_to(lengths[:, None], rows.shape)
    if rows.dtype == tl.float64:
        unit = rows / divisor
    else:
        unit = tl.div_rn(rows, divisor)
    return unit


@triton.jit
def factors_of(along_u, along_v, both):
    """(f, h) such that lambda R^T g = lambda (g + f u + h v), where both = |u + v|^2; see `_rotate_back` there."""
    bisector = (along_u + along_v) / tl.maximum(both, SHORTEST * SHORTEST)
    return 2 * (along_v - bisector), -2 * bisector
