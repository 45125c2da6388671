"""The codebook's moving averages, in two launches.

    _sizes     N_k <- N_k + s_k (counts_k - N_k), and float64 sums of blocks of them
    _averages  the sum N of the blocks; m_k <- m_k + s_k (sums_k - m_k); e_k <- m_k / N'_k where N'_k > 0

with the share s_k = weight_k (1 - decay), or 1 - decay without a weight.

Moved: m and sums read, m and e written, 16 K D bytes. In torch operations it is 40 K D: 12 for lerp_, 8 for the
quotient, 12 for where, 8 for copy_.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZES = 2048
BLOCK_TOTALS = 256
TILE = 2048
NUM_WARPS = 4


@triton.jit
def _lerp(start, end, share):
    """Interpolate with the roundings of torch.lerp: exact at both ends. `share` has the shape of `start`.

    Of opposite numbers also where their difference overflows.
    """
    near_start = share < 0.5
    factor = tl.where(near_start, share, share - 1.0)
    step = end - start
    moved = tl.fma(factor, step, tl.where(near_start, start, end))
    return tl.where(tl.abs(step) < float("inf"), moved, start * (1.0 - share) + end * share)


@triton.jit
def _shares(weight, k, size, step):
    """Return the share of the new statistics for the codes k: step = 1 - decay, times their weight (K,) if given."""
    shares = tl.zeros_like(k).to(tl.float32) + step
    if weight is not None:
        shares = shares * tl.load(weight + k, k < size, other=0.0)
    return shares


@triton.jit
def _sizes(cluster_size, counts, weight, totals, size, step, BLOCK: tl.constexpr):
    """cluster_size and counts (K,) float32, weight (K,) float32 or None, totals (K / BLOCK,) float64."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    start = tl.load(cluster_size + k, inside, other=0.0)
    sizes = _lerp(start, tl.load(counts + k, inside, other=0.0), _shares(weight, k, size, step))
    tl.store(cluster_size + k, sizes, inside)
    tl.store(totals + tl.program_id(0), tl.sum(sizes.to(tl.float64)))


@triton.jit
def _averages(
    codebook, cluster_size, embed_avg, sums, weight, totals, size, dim, blocks, step, eps,
    BLOCK_TOTALS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """codebook, embed_avg and sums (K, dim); cluster_size (K,) as `_sizes` left it, totals (blocks,)."""
    partial = tl.zeros([BLOCK_TOTALS], tl.float64)
    for first in range(0, blocks, BLOCK_TOTALS):
        block = first + tl.arange(0, BLOCK_TOTALS)
        partial += tl.load(totals + block, block < blocks, other=0.0)
    total = tl.sum(partial)
    # In float32, as torch has it where a float64 scalar meets a float32 tensor.
    smallest = (total + size * eps).to(tl.float32)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    sizes = tl.load(cluster_size + k, k < size, other=0.0)
    smoothed = tl.div_rn(sizes + eps, tl.zeros_like(sizes) + smallest) * total.to(tl.float32)

    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = k[:, None] * dim + d[None, :]
    inside = (k < size)[:, None] & (d < dim)[None, :]
    start = tl.load(embed_avg + at, inside, other=0.0)
    shares = tl.broadcast_to(_shares(weight, k, size, step)[:, None], start.shape)
    average = _lerp(start, tl.load(sums + at, inside, other=0.0), shares)
    tl.store(embed_avg + at, average, inside)
    # A NaN, 0 / 0 where nothing was ever counted, isn't positive either.
    moves = (smoothed > 0)[:, None]
    divisor = tl.broadcast_to(tl.where(moves, smoothed[:, None], 1.0), average.shape)
    tl.store(codebook + at, tl.div_rn(average, divisor), inside & moves)


def tile(dim: int) -> tuple[int, int]:
    """(codes, columns) of a program."""
    columns = min(256, triton.next_power_of_2(dim))
    return min(256, TILE // columns), columns


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    weight: Tensor | None = None,
) -> None:
    """Run `fastvq.ema_update_`."""
    size, dim = codebook.shape
    if size == 0:
        return
    state = (codebook, cluster_size, embed_avg)
    # The kernels expect contiguous rows: other tensors are updated in a copy that is written back.
    work = [t.contiguous() for t in state]
    weight = None if weight is None else weight.contiguous()
    blocks = triton.cdiv(size, BLOCK_SIZES)
    block_k, block_d = tile(dim)
    with torch.cuda.device_of(codebook):
        totals = codebook.new_empty(blocks, dtype=torch.float64)
        _sizes[(blocks,)](
            work[1], counts.contiguous(), weight, totals, size, float(1 - decay), BLOCK=BLOCK_SIZES, num_warps=NUM_WARPS
        )
        _averages[(triton.cdiv(size, block_k), max(1, triton.cdiv(dim, block_d)))](
            *work, sums.contiguous(), weight, totals, size, dim, blocks, float(1 - decay), float(eps),
            BLOCK_TOTALS=BLOCK_TOTALS, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=NUM_WARPS,
        )  # fmt: skip
    for target, result in zip(state, work, strict=True):
        if target is not result:
            target.copy_(result)


def aot_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return the shipped cases for `fastvq.kernels.aot`: kernel, types, constants and options."""
    options = {"num_warps": NUM_WARPS, "hot": True}
    scalars = {"step": "fp32", "size": "i32"}
    types = {"cluster_size": "*fp32", "counts": "*fp32", "totals": "*fp64", **scalars}
    cases: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]
    unweighted, weighted = {"weight": None}, {"weight": "*fp32"}
    cases = [
        (_sizes, types, {"BLOCK": BLOCK_SIZES, **unweighted}, options),
        (_sizes, types | weighted, {"BLOCK": BLOCK_SIZES}, options),
    ]
    for dim in (16, 64, 512):
        block_k, block_d = tile(dim)
        types = dict.fromkeys(("codebook", "cluster_size", "embed_avg", "sums"), "*fp32")
        types |= {"totals": "*fp64", **scalars, "dim": "i32:16", "blocks": "i32", "eps": "fp32"}
        constants = {"BLOCK_TOTALS": BLOCK_TOTALS, "BLOCK_K": block_k, "BLOCK_D": block_d}
        cases.append((_averages, types, constants | unweighted, options))
        cases.append((_averages, types | weighted, constants, options))
    return cases
