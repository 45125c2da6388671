"""Rows as the matrix units see them, and how far their scores may be off: the bound B of docs/exactness.md."""

from __future__ import annotations

import triton
import triton.language as tl

from .frame import (
    EXPONENT,
    FAR_NORM,
    FOLD_REST,
    FOLD_SHRINK,
    HALF,
    HIGH,
    HIGH_REST,
    LENGTH,
    LONGEST,
    LOW,
    LOW_REST,
    LOWEST,
    LOWEST_WIDE,
    MAXIMA,
    SCALARS,
    TARGET,
)
from .numbers import LOW_SCALE, UNIT, exponent_of, is_finite, power_of_two, split
from .signatures import ONES, Case, case


@triton.jit
def row_scale(largest, root, scalars, dtype: tl.constexpr):
    """Return (scale of a row, that scale over the codebook's, whether neither was clamped): powers of two.

    A row longer than the codes is scaled down to their size. `largest` is its largest element about the center, and
    2^root >= sqrt(D).
    """
    exponent = tl.load(scalars + EXPONENT).to(tl.int32)
    lowest: tl.constexpr = LOWEST_WIDE if dtype == tl.float64 else LOWEST
    down = tl.minimum(exponent, TARGET - root - exponent_of(largest))
    clamped = tl.maximum(down, lowest)
    # Below -490 the row is so long that the definition may overflow, and below -126 it isn't brought down as it should.
    tame = (clamped - exponent >= -120) & (down >= lowest)
    return power_of_two(clamped, dtype), power_of_two(clamped - exponent, tl.float32), tame


@triton.jit
def maximum_of(maxima, which: tl.constexpr):
    """Load one of the maxima of the codebook's frame."""
    return tl.load(maxima + which).to(tl.float32, bitcast=True)


@triton.jit
def bound_of(square, rest, high_square, low_square, shrink, scalars, maxima, dim, TERMS: tl.constexpr):
    """(B of a row, the least that best - 2 B may be without a far code coming into question), times `shrink`.

    square = |y|^2, rest = the squared length of what its float16 parts leave, high_square and low_square those of the
    parts. See docs/exactness.md for the terms.
    """
    unit: tl.constexpr = UNIT
    # For the float32 arithmetic of the bound itself, and of the squared norms.
    slack = 1.001 + dim * 2.0**-22
    length = tl.sqrt(square) * slack
    high = tl.sqrt(high_square) * slack
    code_length = maximum_of(maxima, LENGTH) * slack + 1e-30
    code_high = maximum_of(maxima, HIGH) * slack
    half = maximum_of(maxima, HALF) * slack * shrink
    # One rounding of x - m and one to float32.
    row_rest = tl.sqrt(rest) * slack + 2 * unit * length
    if TERMS == 1:
        code_rest = maximum_of(maxima, HIGH_REST) * slack + 2 * unit * code_length
        operands = row_rest * code_length + high * code_rest
        products = high * code_high
    else:
        low = tl.sqrt(low_square) * slack
        code_low = maximum_of(maxima, LOW) * slack
        code_rest = maximum_of(maxima, LOW_REST) * slack + 2 * unit * code_length
        operands = row_rest * code_length + (high + low) * code_rest + low * code_low
        products = (high + low) * (code_high + code_low)
    arithmetic = 4 * unit * (dim + 16.0) * (products + half) + unit * (dim + 8.0) * half
    if TERMS == 1:
        arithmetic += maximum_of(maxima, FOLD_REST) * shrink
    # In the scale of the codebook a row is 1 / shrink as long: the inverse of a power of two, whose exponent is turned.
    stretch = power_of_two(1 - exponent_of(shrink), tl.float32)
    reach = length * stretch + code_length
    definition = (dim + 3.0) * 2.0**-54 * (reach * shrink) * reach
    exponent = tl.load(scalars + EXPONENT).to(tl.int32)
    tiny = dim * (dim * 2.0**-118) + dim * power_of_two(2 * exponent - 1074, tl.float32)
    bound = (operands + arithmetic + definition) * slack + tiny
    far = (tl.load(scalars + FAR_NORM) * shrink).to(tl.float32)
    far_floor = tl.where(far >= 4.01 * length, -0.249 * far * (far * stretch), float("inf"))
    return bound, far_floor


@triton.jit
def load_rows(x, at, there, center, d, dim, dtype: tl.constexpr):
    """(x - center of rows that start at `at`, whether the difference is finite, whether x is), columns d."""
    values = tl.load(x + at[:, None] + d[None, :], there[:, None] & (d < dim)[None, :], other=0.0).to(dtype)
    mean = tl.load(center + d, d < dim, other=0.0).to(dtype)
    moved = values - mean[None, :]
    return tl.where(is_finite(moved), moved, 0.0), is_finite(moved), is_finite(values)


@triton.jit
def scaled_rows(x, at, there, center, d, dim, scale):
    """y, in float32: zero where x - center isn't finite."""
    moved, _, _ = load_rows(x, at, there, center, d, dim, scale.dtype)
    return (moved * scale[:, None]).to(tl.float32)


@triton.jit
def measure(
    x, at, there, center, scalars, maxima, dim, root,
    TERMS: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (scale, scale over the codebook's, B, far floor) of a block of rows.

    B is infinite where nothing is promised and a NaN for a non-finite row. Columns are taken a few at a time, so that
    no registers are held.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    step: tl.constexpr = 16
    largest = tl.zeros([BLOCK_N], dtype)
    non_finite = tl.zeros([BLOCK_N], tl.int32)
    over = tl.zeros([BLOCK_N], tl.int32)
    for d0 in range(0, dim, step):
        moved, moved_finite, finite = load_rows(x, at, there, center, d0 + tl.arange(0, step), dim, dtype)
        largest = tl.maximum(largest, tl.max(tl.abs(moved), 1))
        non_finite += tl.sum((finite == 0).to(tl.int32), 1)
        over += tl.sum((moved_finite == 0).to(tl.int32), 1)
    scale, shrink, tame = row_scale(largest, root, scalars, dtype)
    square = tl.zeros([BLOCK_N], tl.float32)
    rest = tl.zeros([BLOCK_N], tl.float32)
    high_square = tl.zeros([BLOCK_N], tl.float32)
    low_square = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, dim, step):
        y = scaled_rows(x, at, there, center, d0 + tl.arange(0, step), dim, scale)
        y_high, y_low, high_rest, low_rest = split(y)
        square += tl.sum(y * y, 1)
        high_square += tl.sum(y_high.to(tl.float32) * y_high.to(tl.float32), 1)
        if TERMS == 1:
            rest += tl.sum(high_rest * high_rest, 1)
        else:
            rest += tl.sum(low_rest * low_rest, 1)
            low = y_low.to(tl.float32) * (1.0 / LOW_SCALE)
            low_square += tl.sum(low * low, 1)
    bound, far_floor = bound_of(square, rest, high_square, low_square, shrink, scalars, maxima, dim, TERMS)
    if TERMS == 1:
        tame = tame & (shrink >= FOLD_SHRINK)
    # Codes that overflowed, or that float32 couldn't scale down, leave nothing to rely on; 0 times infinity is one way.
    bound += tl.where(maximum_of(maxima, LENGTH) <= LONGEST, 0.0, float("inf"))
    bound = tl.where(tame & (over == 0) & (bound == bound), bound, float("inf"))
    return scale, shrink, tl.where(non_finite > 0, float("nan"), bound), far_floor


@triton.jit
def listed_rows(listed, listed_count, head, n, LISTED: tl.constexpr, BLOCK_N: tl.constexpr):
    """(places, rows, which of them are there, whether any is) of this program's block, of all n rows or of a list."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = n
    if LISTED:
        total = tl.load(listed_count + head)
    there = place < total
    rows = place
    if LISTED:
        rows = tl.load(listed + head * n + place, there, other=0).to(tl.int64)
    return place, rows, there, tl.program_id(0) * BLOCK_N < total


@triton.jit
def _rows(
    x, listed, listed_count, center, scalars, maxima, row_high, row_low, measured, n, dim, root,
    LISTED: tl.constexpr, TERMS: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write the float16 parts (H, n, CHUNKS BLOCK_D) of rows that are too long to be kept by a scan.

    `measured` (H, 3, n) float32 takes B, far floor and scale over the codebook's. Each row is at its place in the
    list.
    """
    head = tl.program_id(1).to(tl.int64)
    place, rows, there, any_there = listed_rows(listed, listed_count, head, n, LISTED, BLOCK_N)
    if any_there == 0:
        return
    at = (head * n + rows) * dim
    center += head * dim
    scale, shrink, bound, far_floor = measure(
        x, at, there, center, scalars + head * SCALARS, maxima + head * MAXIMA, dim, root, TERMS, WIDE, BLOCK_N
    )
    measured += head * 3 * n + place
    tl.store(measured, bound, there)
    tl.store(measured + n, far_floor, there)
    tl.store(measured + 2 * n, shrink, there)
    for c in range(CHUNKS):
        d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        y_high, y_low, _, _ = split(scaled_rows(x, at, there, center, d, dim, scale))
        to = (head * n + place)[:, None] * (CHUNKS * BLOCK_D) + d[None, :]
        tl.store(row_high + to, y_high, there[:, None])
        if TERMS == 3:
            tl.store(row_low + to, y_low, there[:, None])


def aot_cases() -> list[Case]:
    """For `kernels/aot.py`."""
    blocks = {"WIDE": False, "BLOCK_N": 32, "CHUNKS": 4}
    smallest = {"LISTED": False, "TERMS": 1, "BLOCK_D": 64, **blocks, "n": 1, "dim": 1}
    return [
        case(_rows, smallest, {"num_warps": 4} | ONES),
        case(_rows, {"LISTED": False, "TERMS": 1, "BLOCK_D": 64, **blocks}, {"num_warps": 4}),
        case(_rows, {"LISTED": True, "TERMS": 3, "BLOCK_D": 32, **blocks}, {"num_warps": 4}, dtype="bfloat16"),
    ]
