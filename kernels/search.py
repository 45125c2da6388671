"""Certified search on matrix units.

    scan        scores of all codes for a block of rows, one float16 product or three; best, second best, bound
    certify     final where the two are further apart than twice the bound; else into the work list of the next scan
    define      what no scan could settle, by the definition

The scores are those of docs/exactness.md with the sign turned, a_k = <y, f_k> - |f_k|^2 / 2, and the largest wins.
Finding the index usually costs more than the scores. Here the largest score is kept twice: of each column of the tile
over all tiles, and of each tile over all columns. The two together name the code, and since every other code lies in
another column or in another tile, they also have the second best.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .frame import (
    EXPONENT,
    FAR_NORM,
    FOLD_COLUMNS,
    FOLD_REST,
    FOLD_SHRINK,
    HALF,
    HIGH,
    HIGH_REST,
    LENGTH,
    LOW,
    LOW_REST,
    MAXIMA,
    SCALARS,
    TARGET,
    USABLE,
    Frame,
    columns_of,
    prepare,
)
from .numbers import LOW_SCALE, UNIT, exponent_of, is_finite, power_of_two, split, to_float16

SLACK = tl.constexpr(1.001)
"""For the float32 arithmetic of the bound itself, and for squares summed in float32 over up to 4096 dimensions."""


@triton.jit
def row_scale(largest, root, scalars, dtype: tl.constexpr):
    """(scale of a row, that scale over the codebook's, whether both are what they should be): powers of two. A row
    longer than the codes is brought down to their size. `largest` is its largest element about the centre, and
    2^root >= sqrt(D)."""
    exponent = tl.load(scalars + EXPONENT).to(tl.int32)
    lowest: tl.constexpr = -490 if dtype == tl.float64 else -126
    down = tl.minimum(exponent, TARGET - root - exponent_of(largest))
    clamped = tl.maximum(down, lowest)
    # Below -490 the row is so long that the definition may overflow; in float32 the last two steps don't matter.
    tame = clamped - exponent >= -120
    if dtype == tl.float64:
        tame = tame & (down >= lowest)
    return power_of_two(clamped, dtype), power_of_two(clamped - exponent, tl.float32), tame


@triton.jit
def bound_of(
    square, rest, high_square, low_square, shrink, scalars, maxima, dim, TERMS: tl.constexpr, FOLD: tl.constexpr
):
    """(B of a row, the least that best - 2 B may be without a far code coming into question), times `shrink`.

    square = |y|^2, rest = the squared length of what its float16 parts leave, high_square and low_square those of the
    parts. See docs/exactness.md for the terms.
    """
    length = tl.sqrt(square) * SLACK
    high = tl.sqrt(high_square) * SLACK
    unit: tl.constexpr = UNIT
    # One rounding of x - m and one to float32.
    row_rest = tl.sqrt(rest) * SLACK + 2 * unit * length
    code_length = maximum_of(maxima, LENGTH) * SLACK + 1e-30
    code_high = maximum_of(maxima, HIGH) * SLACK
    half = maximum_of(maxima, HALF) * SLACK * shrink
    if TERMS == 1:
        code_rest = maximum_of(maxima, HIGH_REST) * SLACK + 2 * unit * code_length
        operands = row_rest * code_length + high * code_rest
    else:
        low = tl.sqrt(low_square) * SLACK
        code_low = maximum_of(maxima, LOW) * SLACK
        code_rest = maximum_of(maxima, LOW_REST) * SLACK + 2 * unit * code_length
        operands = row_rest * code_length + (high + low) * code_rest + low * code_low
    gamma = 4 * unit * (dim + 16.0)
    arithmetic = gamma * (1.01 * (high * code_high + half)) + unit * (dim + 8.0) * half
    if FOLD and TERMS == 1:
        arithmetic += maximum_of(maxima, FOLD_REST) * shrink
    # In the scale of the codebook a row is 1 / shrink as long.
    reach = length / shrink + code_length
    definition = (dim + 3.0) * 2.0**-54 * (reach * shrink) * reach
    exponent = tl.load(scalars + EXPONENT).to(tl.int32)
    tiny = dim * (dim * 2.0**-118) + dim * power_of_two(2 * exponent - 1074, tl.float32)
    bound = (operands + arithmetic + definition) * SLACK + tiny
    far = (tl.load(scalars + FAR_NORM) * shrink).to(tl.float32)
    far_floor = tl.where(far >= 4.01 * length, -0.249 * far * (far / shrink), float("inf"))
    return bound, far_floor


@triton.jit
def maximum_of(maxima, which: tl.constexpr):
    return tl.load(maxima + which).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(x, at, there, centre, d, dim, dtype: tl.constexpr):
    """(x - centre of rows that start at `at`, whether the difference is finite, whether x is), columns d."""
    values = tl.load(x + at[:, None] + d[None, :], there[:, None] & (d < dim)[None, :], other=0.0).to(dtype)
    mean = tl.load(centre + d, d < dim, other=0.0).to(dtype)
    moved = values - mean[None, :]
    return tl.where(is_finite(moved), moved, 0.0), is_finite(moved), is_finite(values)


@triton.jit
def append(chosen, rows, work, count):
    """Adds the chosen rows to a work list; their order is anyone's, and nothing depends on it."""
    flags = chosen.to(tl.int32)
    total = tl.sum(flags)
    if total > 0:
        first = tl.atomic_add(count, total)
        tl.store(work + first + tl.cumsum(flags) - flags, rows, chosen)


@triton.jit
def certify(best, second, index, bound, far_floor, there, rows, usable, out, work, count):
    """Final where best - second > 2 B; -1 where the row isn't finite (its bound is a NaN) or no code is; else open."""
    finite = bound == bound
    certain = (best - second > 2 * bound) & (best - 2 * bound > far_floor)
    answer = tl.where(finite & (usable > 0), index.to(tl.int64), -1)
    settled = certain | (finite == 0) | (usable == 0)
    tl.store(out + rows, answer, there & settled)
    append(there & (settled == 0), rows, work, count)


@triton.jit
def _scan(
    x, listed, listed_count, centre, scalars, maxima, high, low, half, out, work, count, partial, partial_index, bounds,
    n, dim, root, padded, tiles_a_split,
    LISTED: tl.constexpr, TERMS: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the codes.

    x (H, n, dim); listed (H, n) the rows to take, where LISTED, of which listed_count (H,) are there. partial
    (H, splits, 2, n) and bounds (H, 2, n) float32 with partial_index (H, splits, n) int32 take the results where SPLIT;
    else they are certified here.
    """
    split_id, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scalars += head * SCALARS
    maxima += head * MAXIMA
    centre += head * dim
    total = n
    if LISTED:
        total = tl.load(listed_count + head)
        if tl.program_id(0) * BLOCK_N >= total:
            return
    there = place < total
    rows = place
    if LISTED:
        rows = tl.load(listed + head * n + place, there, other=0).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    at = (head * n + rows) * dim

    largest = tl.zeros([BLOCK_N], dtype)
    bad = tl.zeros([BLOCK_N], tl.int32)
    over = tl.zeros([BLOCK_N], tl.int32)
    for c in tl.static_range(CHUNKS):
        moved, moved_finite, finite = load_rows(x, at, there, centre, c * BLOCK_D + tl.arange(0, BLOCK_D), dim, dtype)
        largest = tl.maximum(largest, tl.max(tl.abs(moved), 1))
        bad += tl.sum((finite == 0).to(tl.int32), 1)
        over += tl.sum((moved_finite == 0).to(tl.int32), 1)
    scale, shrink, tame = row_scale(largest, root, scalars, dtype)

    square = tl.zeros([BLOCK_N], tl.float32)
    rest, high_square, low_square = square, square, square
    for c in tl.static_range(CHUNKS):
        d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        moved, _, _ = load_rows(x, at, there, centre, d, dim, dtype)
        y = (moved * scale[:, None]).to(tl.float32)
        y_high, y_low, high_rest, low_rest = split(y)
        square += tl.sum(y * y, 1)
        high_square += tl.sum(y_high.to(tl.float32) * y_high.to(tl.float32), 1)
        if TERMS == 1:
            rest += tl.sum(high_rest * high_rest, 1)
        else:
            rest += tl.sum(low_rest * low_rest, 1)
            y_low_square = y_low.to(tl.float32) * (1.0 / LOW_SCALE)
            low_square += tl.sum(y_low_square * y_low_square, 1)
        if FOLD and TERMS == 1:
            folded = (d >= dim) & (d < dim + FOLD_COLUMNS)
            y_high = tl.where(folded[None, :], -shrink[:, None], y_high.to(tl.float32)).to(tl.float16)
    bound, far_floor = bound_of(square, rest, high_square, low_square, shrink, scalars, maxima, dim, TERMS, FOLD)
    if FOLD and TERMS == 1:
        tame = tame & (shrink >= FOLD_SHRINK)
    bound = tl.where(tame & (over == 0), bound, float("inf"))
    bound = tl.where(bad > 0, float("nan"), bound)

    columns: tl.constexpr = CHUNKS * BLOCK_D
    column = tl.arange(0, BLOCK_K)
    first_tile = split_id * tiles_a_split
    last_tile = tl.minimum(first_tile + tiles_a_split, padded // BLOCK_K)
    start = (head * padded + first_tile.to(tl.int64) * BLOCK_K) * columns
    inside = column[:, None] * columns + tl.arange(0, BLOCK_D)[None, :]
    high += start
    low += start
    half += head * padded + first_tile.to(tl.int64) * BLOCK_K
    of_column = tl.full([BLOCK_N, BLOCK_K], float("-inf"), tl.float32)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second = best
    best_tile = tl.zeros([BLOCK_N], tl.int32)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        if CHUNKS == 1:
            code_high = tl.load(high + inside).trans()
            scores = tl.dot(y_high, code_high)
            if TERMS == 3:
                fine = tl.dot(y_low, code_high)
                fine = tl.dot(y_high, tl.load(low + inside).trans(), fine)
                scores += fine * (1.0 / LOW_SCALE)
        else:
            scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            fine = scores
            for c in range(CHUNKS):
                d = c * BLOCK_D + tl.arange(0, BLOCK_D)
                moved, _, _ = load_rows(x, at, there, centre, d, dim, dtype)
                y = (moved * scale[:, None]).to(tl.float32)
                code_high = tl.load(high + c * BLOCK_D + inside).trans()
                if TERMS == 1:
                    scores = tl.dot(to_float16(y), code_high, scores)
                else:
                    y_high, y_low, _, _ = split(y)
                    scores = tl.dot(y_high, code_high, scores)
                    fine = tl.dot(y_low, code_high, fine)
                    fine = tl.dot(y_high, tl.load(low + c * BLOCK_D + inside).trans(), fine)
            if TERMS == 3:
                scores += fine * (1.0 / LOW_SCALE)
        if TERMS == 3 or not FOLD:
            scores -= tl.load(half + column)[None, :] * shrink[:, None]
        of_column = tl.maximum(of_column, scores)
        of_tile = tl.max(scores, 1)
        second = tl.maximum(second, tl.minimum(best, of_tile))
        best_tile = tl.where(of_tile > best, tile, best_tile)
        best = tl.maximum(best, of_tile)
        high += BLOCK_K * columns
        low += BLOCK_K * columns
        half += BLOCK_K
    best_column = tl.min(tl.where(of_column == best[:, None], column[None, :], BLOCK_K - 1), 1)
    elsewhere = tl.where(column[None, :] == best_column[:, None], float("-inf"), of_column)
    second = tl.maximum(second, tl.max(elsewhere, 1))
    index = best_tile * BLOCK_K + best_column

    if SPLIT:
        slot = (head * tl.num_programs(1) + split_id) * n + place
        tl.store(partial + 2 * (head * tl.num_programs(1) + split_id) * n + place, best, there)
        tl.store(partial + (2 * (head * tl.num_programs(1) + split_id) + 1) * n + place, second, there)
        tl.store(partial_index + slot, index, there)
        if split_id == 0:
            tl.store(bounds + head * 2 * n + place, bound, there)
            tl.store(bounds + (head * 2 + 1) * n + place, far_floor, there)
    else:
        usable = tl.load(scalars + USABLE).to(tl.int32) + tl.zeros([BLOCK_N], tl.int32)
        certify(
            best, second, index, bound, far_floor, there, rows, usable, out + head * n, work + head * n, count + head
        )


@triton.jit
def _merge(
    listed, listed_count, scalars, partial, partial_index, bounds, out, work, count, n, splits,
    LISTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Certifies rows whose codes were split among programs."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = n
    if LISTED:
        total = tl.load(listed_count + head)
        if tl.program_id(0) * BLOCK_N >= total:
            return
    there = place < total
    rows = place
    if LISTED:
        rows = tl.load(listed + head * n + place, there, other=0).to(tl.int64)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second = best
    index = tl.zeros([BLOCK_N], tl.int32)
    for s in range(splits):
        slot = head * splits + s
        value = tl.load(partial + 2 * slot * n + place, there, other=float("-inf"))
        runner_up = tl.load(partial + (2 * slot + 1) * n + place, there, other=float("-inf"))
        code = tl.load(partial_index + slot * n + place, there, other=0)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, value))
        index = tl.where(value > best, code, index)
        best = tl.maximum(best, value)
    bound = tl.load(bounds + head * 2 * n + place, there, other=0.0)
    far_floor = tl.load(bounds + (head * 2 + 1) * n + place, there, other=0.0)
    usable = tl.load(scalars + head * SCALARS + USABLE).to(tl.int32) + tl.zeros([BLOCK_N], tl.int32)
    certify(best, second, index, bound, far_floor, there, rows, usable, out + head * n, work + head * n, count + head)


@triton.jit
def _close(value, size_of_terms, dim, L2: tl.constexpr):
    """By how much a float32 distance or inner product may be off: (D + 8) u of it, or of the size of its terms."""
    return (dim + 8.0) * 1.01 * UNIT * (value if L2 else size_of_terms) + dim * 2.0**-125


@triton.jit
def _direct(x, codebook, k, there, dim, L2: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """(float32 score of one row with the codes k, its possible error, whether the code is finite)."""
    value = tl.zeros([BLOCK_K], tl.float32)
    terms = tl.zeros([BLOCK_K], tl.float32)
    bad = tl.zeros([BLOCK_K], tl.int32)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        row = tl.load(x + d, d < dim, other=0.0).to(tl.float32)[None, :]
        codes = tl.load(
            codebook + k.to(tl.int64)[:, None] * dim + d[None, :], there[:, None] & (d < dim)[None, :], other=0.0
        ).to(tl.float32)
        bad += tl.sum((is_finite(codes) == 0).to(tl.int32), 1)
        if L2:
            value += tl.sum((row - codes) * (row - codes), 1)
        else:
            value -= tl.sum(row * codes, 1)
            terms += tl.sum(tl.abs(row * codes), 1)
    return value, _close(value, terms, dim, L2), there & (bad == 0)


@triton.jit
def _define(
    x, codebook, listed, listed_count, out, n, size, dim,
    L2: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows of a work list by the definition, one at a time: float32 distances to all codes first, then float64 for
    those that may be the nearest. Compiled without fusing products into sums."""
    head = tl.program_id(1).to(tl.int64)
    x += head * n * dim
    codebook += head * size * dim
    column = tl.arange(0, BLOCK_K)
    for place in range(tl.program_id(0), tl.load(listed_count + head), tl.num_programs(0)):
        row = tl.load(listed + head * n + place).to(tl.int64)
        x_row = x + row * dim
        ceiling = tl.full([BLOCK_K], float("inf"), tl.float32)
        if not WIDE:
            for first in range(0, size, BLOCK_K):
                k = first + column
                value, error, usable = _direct(x_row, codebook, k, k < size, dim, L2, BLOCK_K, BLOCK_D)
                ceiling = tl.where(usable & (value + error < ceiling), value + error, ceiling)
        limit = tl.min(ceiling)
        best = tl.full([BLOCK_K], float("inf"), tl.float64)
        best_code = tl.full([BLOCK_K], -1, tl.int64)
        for first in range(0, size, BLOCK_K):
            k = first + column
            value, error, usable = _direct(x_row, codebook, k, k < size, dim, L2, BLOCK_K, BLOCK_D)
            # What overflowed float32, to a NaN maybe, stays in question.
            possible = usable
            if not WIDE:
                possible = usable & ((value - error > limit) == 0)
            if tl.max(possible.to(tl.int32)) > 0:
                score = tl.zeros([BLOCK_K], tl.float64)
                for j in range(dim):
                    a = tl.load(x_row + j).to(tl.float64)
                    b = tl.load(codebook + k.to(tl.int64) * dim + j, possible, other=0.0).to(tl.float64)
                    if L2:
                        difference = a - b
                        score = score + difference * difference
                    else:
                        score = score - a * b
                score = tl.where(score == score, score, float("inf"))
                # Later codes of a lane only win if they are nearer; the first candidate always does.
                wins = possible & ((best_code < 0) | (score < best))
                best = tl.where(wins, score, best)
                best_code = tl.where(wins, k.to(tl.int64), best_code)
        answered = best_code >= 0
        smallest = tl.min(tl.where(answered, best, float("inf")))
        code = tl.min(tl.where(answered & (best == smallest), best_code, 1 << 62))
        tl.store(out + head * n + row, tl.where(tl.max(answered.to(tl.int32)) > 0, code, -1))


def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Exact nearest codes: `fastvq.search` defines what this computes. Nothing here waits for the device."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    rows = x.contiguous().view(-1, *x.shape[-2:])
    codes = codebook.contiguous().view(-1, *codebook.shape[-2:])
    with torch.cuda.device_of(x):
        _search(rows, codes, indices.view(rows.shape[:2]), metric)
    return indices


def _search(x: Tensor, codebook: Tensor, out: Tensor, metric: str) -> None:
    heads, n, dim = x.shape
    size = codebook.shape[1]
    wide = torch.float64 in (x.dtype, codebook.dtype)
    columns, block_d = columns_of(dim)
    tiers = [launch.scan(x.device, terms, columns) for terms in (1, 3)]
    frame = prepare(codebook, metric=metric, wide=wide, block_codes=max(tier.block_k for tier in tiers))
    work = x.new_empty(2, heads, n, dtype=torch.int32 if n < 2**31 else torch.int64)
    counts = x.new_zeros(2, heads, dtype=torch.int32)
    listed: tuple[Tensor, Tensor] | None = None
    for terms, tier, todo, count in zip((1, 3), tiers, work, counts, strict=True):
        _tier(x, frame, out, listed, (todo, count), size, terms, tier, wide)
        listed = (todo, count)
    define = launch.define(x.device)
    _define[(min(n, define.programs), heads)](
        x, codebook, *listed, out, n, size, dim, L2=metric == "l2", WIDE=wide, BLOCK_K=define.block_k,
        BLOCK_D=min(block_d, 64), num_warps=define.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def _tier(
    x: Tensor,
    frame: Frame,
    out: Tensor,
    listed: tuple[Tensor, Tensor] | None,
    work: tuple[Tensor, Tensor],
    size: int,
    terms: int,
    tier: launch.Scan,
    wide: bool,
) -> None:
    heads, n, dim = x.shape
    padded, columns = frame.high.shape[1:]
    block_d = columns_of(dim)[1]
    tiles = triton.cdiv(padded, tier.block_k)
    blocks = triton.cdiv(n, tier.block_n)
    splits = launch.splits(x.device, blocks * heads, tiles, n, listed=listed is not None)
    rows, row_count = listed or work
    partial = x.new_empty(heads, splits if splits > 1 else 0, 2, n, dtype=torch.float32)
    partial_index = x.new_empty(heads, splits if splits > 1 else 0, n, dtype=torch.int32)
    bounds = x.new_empty(heads, 2 if splits > 1 else 0, n, dtype=torch.float32)
    root = ((dim - 1).bit_length() + 1) // 2
    _scan[(blocks, splits, heads)](
        x, rows, row_count, frame.centre, frame.scalars, frame.maxima, frame.high, frame.low, frame.half, out, *work,
        partial, partial_index, bounds, n, dim, root, padded, triton.cdiv(tiles, splits),
        LISTED=listed is not None, TERMS=terms, FOLD=frame.fold, WIDE=wide, SPLIT=splits > 1, BLOCK_N=tier.block_n,
        BLOCK_K=tier.block_k, BLOCK_D=block_d, CHUNKS=columns // block_d, STAGES=tier.num_stages,
        num_warps=tier.num_warps,
    )  # fmt: skip
    if splits > 1:
        _merge[(triton.cdiv(n, 256), heads)](
            rows, row_count, frame.scalars, partial, partial_index, bounds, out, *work, n, splits,
            LISTED=listed is not None, BLOCK_N=256,
        )  # fmt: skip
