"""Certified rows after a scan, and the uncertified ones that go on to the next."""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import UNIT


@triton.jit
def append(chosen, rows, work, count):
    """Add the chosen rows to a work list. Their order is arbitrary, and nothing depends on it."""
    flags = chosen.to(tl.int32)
    total = tl.sum(flags)
    if total > 0:
        first = tl.atomic_add(count, total)
        tl.store(work + first + tl.cumsum(flags) - flags, rows, chosen)


@triton.jit
def possible_error(value, size_of_terms, dim, L2: tl.constexpr):
    """Return the largest error of a float32 distance or inner product: (D + 8) u of it, or of the size of its terms."""
    return (dim + 8.0) * 1.01 * UNIT * (value if L2 else size_of_terms) + dim * 2.0**-125


@triton.jit
def distances_to(x, at, codebook, norms, k, there, dim, L2: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (float32 score of each row with its code k, the largest error, whether that code can be the nearest)."""
    step: tl.constexpr = 16
    there = there & (tl.load(norms + k, there, other=-1.0) >= 0)
    value = tl.zeros([BLOCK_N], tl.float32)
    terms = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, dim, step):
        d = d0 + tl.arange(0, step)
        mask = there[:, None] & (d < dim)[None, :]
        rows = tl.load(x + at[:, None] + d[None, :], mask, other=0.0).to(tl.float32)
        codes = tl.load(codebook + k[:, None] * dim + d[None, :], mask, other=0.0).to(tl.float32)
        if L2:
            value += tl.sum((rows - codes) * (rows - codes), 1)
        else:
            value -= tl.sum(rows * codes, 1)
            terms += tl.sum(tl.abs(rows * codes), 1)
    return value, possible_error(value, terms, dim, L2), there


@triton.jit
def certify(
    best, second, index, bound, far_floor, there, rows, at, x, codebook, norms, size, dim, usable, out, work, count,
    PAIRED: tl.constexpr, L2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the index of each certified or excluded row, and append the uncertified ones to `work`.

    A row is certified where best - second > 2 B. It gets -1 where it is not finite (its bound is a NaN) or no code is.
    Where PAIRED, the best is that of codes 2 index and 2 index + 1, which float32 distances must tell apart.
    """
    finite = bound == bound
    certain = (best - second > 2 * bound) & (best - 2 * bound > far_floor)
    index = index.to(tl.int64)
    if PAIRED:
        index = 2 * index
        # The best of an uncertified row may be padding.
        first, error, first_there = distances_to(
            x, at, codebook, norms, index, there & (index < size), dim, L2, BLOCK_N
        )
        other, other_error, other_there = distances_to(
            x, at, codebook, norms, index + 1, there & (index + 1 < size), dim, L2, BLOCK_N
        )
        takes_first = first_there & ((other_there == 0) | (first + error < other - other_error))
        takes_other = other_there & ((first_there == 0) | (other + other_error < first - error))
        certain = certain & (takes_first | takes_other)
        index = tl.where(takes_other, index + 1, index)
    certain = certain & (index < size)
    answer = tl.where(finite & (usable > 0), index, -1)
    done = certain | (finite == 0) | (usable == 0)
    tl.store(out + rows, answer, there & done)
    append(there & (done == 0), rows, work, count)
