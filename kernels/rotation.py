"""The rotation estimator's arithmetic, a row at a time: fastvq/backends/reference/quantize.py has the formula.

For nearly opposite vectors the sum u + v of the unit vectors, which the rotation follows, is smaller than the rounding
of u and v. One rounding of (|e| / |x|) x + e, in a fused multiply-add, keeps its digits, and `factors_of` takes the
error of the ratio out of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.backends import arithmetic

SHORTEST = tl.constexpr(arithmetic.SHORTEST)

GIANT = tl.constexpr(2.0**40)
SHRINK = tl.constexpr(2.0**-88)


@triton.jit
def shrink_of(largest):
    """Return the factor of rows with these largest magnitudes, such that squares don't overflow: a power of two."""
    return tl.where(largest > GIANT, SHRINK, 1.0).to(largest.dtype)


@triton.jit
def both_of(x, e, x_length, e_length):
    """Return rows z, nearly |e| (u + v) with u = x / |x| and v = e / |e|."""
    return tl.fma(tl.broadcast_to((e_length / x_length)[:, None], x.shape), x, e)


@triton.jit
def factors_of(xz, zz, xg, eg, zg, x_length, e_length):
    """Return (f, h) such that lambda R^T g = lambda (g + f x + h z), from inner products of x, e, g and z of `both_of`.

    The ratio in w = z / |e| is |e| / |x| but for its rounding, so that u + v = w + c u, with the c
    that makes |u + v - u| = 1.
    """
    uw, ww = xz / x_length / e_length, zz / e_length / e_length
    ug, vg, wg = xg / x_length, eg / e_length, zg / e_length
    c = 0.5 * ww - uw
    both = ww + 2 * c * uw + c * c
    bisector = (wg + c * ug) / tl.maximum(both, SHORTEST * SHORTEST)
    return 2 * (vg - bisector * c) / x_length, -2 * bisector / e_length
