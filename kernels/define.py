"""Search of the rows that no scan certifies, by the definition itself."""

from __future__ import annotations

import triton
import triton.language as tl

from .certify import possible_error
from .launch import DEFINE
from .signatures import ONES, Case, case


@triton.jit
def _direct(x, codebook, norms, k, size, dim, L2: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return (float32 score of one row with the codes k, the largest error, whether a code can be the nearest)."""
    there = tl.load(norms + k, k < size, other=-1.0) >= 0
    value = tl.zeros([BLOCK_K], tl.float32)
    terms = tl.zeros([BLOCK_K], tl.float32)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        row = tl.load(x + d, d < dim, other=0.0).to(tl.float32)[None, :]
        codes = tl.load(
            codebook + k.to(tl.int64)[:, None] * dim + d[None, :], there[:, None] & (d < dim)[None, :], other=0.0
        )
        codes = codes.to(tl.float32)
        if L2:
            value += tl.sum((row - codes) * (row - codes), 1)
        else:
            value -= tl.sum(row * codes, 1)
            terms += tl.sum(tl.abs(row * codes), 1)
    return value, possible_error(value, terms, dim, L2), there


@triton.jit
def nearest(
    x, codebook, norms, size, dim, L2: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return the index of one finite row at x by the definition, -1 where no code is finite.

    float32 distances to all codes come first, then float64 for those that may be the nearest. It must be compiled
    without fusing products into sums.
    """
    column = tl.arange(0, BLOCK_K)
    ceiling = tl.full([BLOCK_K], float("inf"), tl.float32)
    if not WIDE:
        for first in range(0, size, BLOCK_K):
            k = first + column
            value, error, usable = _direct(x, codebook, norms, k, size, dim, L2, BLOCK_K, BLOCK_D)
            ceiling = tl.where(usable & (value + error < ceiling), value + error, ceiling)
    limit = tl.min(ceiling)
    best = tl.full([BLOCK_K], float("inf"), tl.float64)
    best_code = tl.full([BLOCK_K], -1, tl.int64)
    for first in range(0, size, BLOCK_K):
        k = first + column
        value, error, usable = _direct(x, codebook, norms, k, size, dim, L2, BLOCK_K, BLOCK_D)
        possible = usable
        if not WIDE:
            # A score that overflows float32, even to a NaN, does not exclude its code.
            possible = usable & ((value - error > limit) == 0)
        if tl.max(possible.to(tl.int32)) > 0:
            score = tl.zeros([BLOCK_K], tl.float64)
            for j in range(dim):
                a = tl.load(x + j).to(tl.float64)
                b = tl.load(codebook + k.to(tl.int64) * dim + j, possible, other=0.0).to(tl.float64)
                if L2:
                    difference = a - b
                    score = score + difference * difference
                else:
                    score = score - a * b
            score = tl.where(score == score, score, float("inf"))
            # A later code of a lane wins only if it is nearer; the first candidate always does.
            wins = possible & ((best_code < 0) | (score < best))
            best = tl.where(wins, score, best)
            best_code = tl.where(wins, k.to(tl.int64), best_code)
    answered = best_code >= 0
    smallest = tl.min(tl.where(answered, best, float("inf")))
    code = tl.min(tl.where(answered & (best == smallest), best_code, 1 << 62))
    return tl.where(tl.max(answered.to(tl.int32)) > 0, code, -1)


@triton.jit
def _define(
    x, codebook, norms, listed, listed_count, out, n, size, dim,
    L2: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`nearest` for the rows of a work list, one at a time."""
    head = tl.program_id(1).to(tl.int64)
    x += head * n * dim
    codebook += head * size * dim
    norms += head * 2 * size
    for place in range(tl.program_id(0), tl.load(listed_count + head), tl.num_programs(0)):
        row = tl.load(listed + head * n + place).to(tl.int64)
        tl.store(out + head * n + row, nearest(x + row * dim, codebook, norms, size, dim, L2, WIDE, BLOCK_K, BLOCK_D))


def aot_cases() -> list[Case]:
    """For `kernels/aot.py`."""
    options = {"num_warps": DEFINE.num_warps, "enable_fp_fusion": False, "exact": True}
    blocks = {"BLOCK_K": DEFINE.block_k, "BLOCK_D": DEFINE.block_d}
    smallest = {"L2": True, "WIDE": False, "n": 1, "size": 1, "dim": 1} | blocks
    return [
        case(_define, smallest, options | ONES),
    ] + [
        case(_define, {"L2": l2, "WIDE": dtype == "float64", **blocks}, options, dtype=dtype)
        for dtype, l2 in (("float32", True), ("float32", False), ("bfloat16", True), ("float64", True))
    ]
