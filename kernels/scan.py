"""The inner loop of every search: the best and the second best of all scores of a block of rows.

The scores are those of docs/exactness.md with the sign turned, a_k = <y, f_k> - |f_k|^2 / 2, and the largest wins.
Finding the index usually costs more than the scores. Here the largest score is kept twice: of each column of the tile
over all tiles, and of each tile over all columns. The two together name the code, and since every other code lies in
another column or in another tile, they also have the second best.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .frame import FOLD_COLUMNS
from .numbers import LOW_SCALE


@triton.jit
def best_two(
    y_high, y_low, shrink, there, high, low, half, folded, first_tile, last_tile,
    TERMS: tl.constexpr, BESIDE: tl.constexpr, PREPARED: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(best, second best, index of the best) of the codes in tiles [first_tile, last_tile), times the rows' `shrink`.

    y_high and y_low (BLOCK_N, BLOCK_D) float16 are the rows, or where PREPARED pointers to CHUNKS such blocks, side by
    side. high, low (tiles, BLOCK_K, CHUNKS BLOCK_D), half (tiles, BLOCK_K) and folded (tiles, BLOCK_K, 16) are the
    codes of a frame. Where PAIRED, the index counts pairs of codes. In a tie, the second best is as good as the best.
    """
    columns: tl.constexpr = CHUNKS * BLOCK_D
    column = tl.arange(0, BLOCK_K)
    beside = tl.arange(0, 16)
    negative_shrink = tl.where((beside < FOLD_COLUMNS)[None, :], -shrink[:, None], 0.0).to(tl.float16)
    first_code = first_tile.to(tl.int64) * BLOCK_K
    inside = first_code * columns + column[:, None] * columns + tl.arange(0, BLOCK_D)[None, :]
    high += inside
    low += inside
    half += first_code + column
    folded += first_code * 16 + column[:, None] * 16 + beside[None, :]
    # Where PAIRED, two neighboring codes are as one.
    groups: tl.constexpr = BLOCK_K // 2 if PAIRED else BLOCK_K
    group = tl.arange(0, groups)
    of_group = tl.full([BLOCK_N, groups], float("-inf"), tl.float32)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second = best
    best_tile = tl.zeros([BLOCK_N], tl.int32)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        if PREPARED:
            if TERMS == 1:
                scores = tl.dot(negative_shrink, tl.load(folded).trans())
            else:
                scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            fine = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for c in tl.range(CHUNKS, num_stages=STAGES):
                code_high = tl.load(high + c * BLOCK_D).trans()
                part_high = tl.load(y_high + c * BLOCK_D, there[:, None], other=0.0)
                scores = tl.dot(part_high, code_high, scores)
                if TERMS == 3:
                    part_low = tl.load(y_low + c * BLOCK_D, there[:, None], other=0.0)
                    fine = tl.dot(part_low, code_high, fine)
                    fine = tl.dot(part_high, tl.load(low + c * BLOCK_D).trans(), fine)
            if TERMS == 3:
                scores += fine * (1.0 / LOW_SCALE)
        elif TERMS == 3:
            code_high = tl.load(high).trans()
            fine = tl.dot(y_low, code_high)
            fine = tl.dot(y_high, tl.load(low).trans(), fine)
            scores = tl.dot(y_high, code_high) + fine * (1.0 / LOW_SCALE)
        elif BESIDE:
            scores = tl.dot(negative_shrink, tl.load(folded).trans())
            scores = tl.dot(y_high, tl.load(high).trans(), scores)
        else:
            scores = tl.dot(y_high, tl.load(high).trans())
        if TERMS == 3:
            scores -= tl.load(half)[None, :] * shrink[:, None]
        if PAIRED:
            scores = tl.max(scores.reshape(BLOCK_N, groups, 2), 2)
        of_group = tl.maximum(of_group, scores)
        of_tile = tl.max(scores, 1)
        second = tl.maximum(second, tl.minimum(best, of_tile))
        best_tile = tl.where(of_tile > best, tile, best_tile)
        best = tl.maximum(best, of_tile)
        high += BLOCK_K * columns
        low += BLOCK_K * columns
        half += BLOCK_K
        folded += BLOCK_K * 16
    best_group = tl.min(tl.where(of_group == best[:, None], group[None, :], groups - 1), 1)
    elsewhere = tl.where(group[None, :] == best_group[:, None], float("-inf"), of_group)
    second = tl.maximum(second, tl.max(elsewhere, 1))
    return best, second, best_tile * groups + best_group
