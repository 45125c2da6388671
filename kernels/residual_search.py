"""The op `residual_search`: all stages in one launch.

A program keeps its block of rows through all stages. It writes the residual of a stage to scratch memory that only this
program reads and that stays in its cache. Each stage is scanned in three products, since one product would hardly ever
certify all rows of a block; the program searches its uncertified rows by the definition at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends.arithmetic import joined
from fastvq.backends.torch.residual_search import search_stages

from . import launch
from .define import nearest
from .frame import MAXIMA, SCALARS, USABLE, columns_of, prepare
from .numbers import split
from .rows import measure, scaled_rows
from .scan import best_two
from .search import LEAST_ROWS, SCRATCH, search
from .signatures import ONES, Case, case

WARPS = 8
DEFINE_K, DEFINE_D = 32, 16
"""Codes and columns taken at once by the definition: few, beside what the scan holds in registers."""


@triton.jit
def _residual_search(
    residual, codebook, center, scalars, norms, maxima, high, low, half, folded, row_high, row_low, out,
    n, size, dim, root, padded, stages,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    DEFINE_K: tl.constexpr, DEFINE_D: tl.constexpr,
):  # fmt: skip
    """Search the stages of a residual quantizer for the rows of residual (n, dim) float32, which is overwritten.

    codebook is (stages, size, dim) and out (n, stages); row_high and row_low (n, CHUNKS BLOCK_D) float16 are scratch.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_N)
    there = rows < n
    columns: tl.constexpr = CHUNKS * BLOCK_D
    inner = tl.arange(0, BLOCK_D)
    long = tl.full([], 1, tl.int64)
    at = rows * dim
    scratch = rows[:, None] * columns + inner[None, :]
    for stage in range(stages):
        scale, shrink, bound, far_floor = measure(
            residual, at, there, center, scalars, maxima, dim, root, 3, False, BLOCK_N
        )
        for c in range(CHUNKS):
            y = scaled_rows(residual, at, there, center, c * BLOCK_D + inner, dim, scale)
            y_high, y_low, _, _ = split(y)
            tl.store(row_high + scratch + c * BLOCK_D, y_high, there[:, None])
            tl.store(row_low + scratch + c * BLOCK_D, y_low, there[:, None])
        # Other threads of the block read what these have written.
        tl.debug_barrier()
        best, second, index = best_two(
            row_high + scratch, row_low + scratch, shrink, there, high, low, half, folded,
            tl.program_id(0) * 0, padded // BLOCK_K, 3, True, True, False, BLOCK_N, BLOCK_K, BLOCK_D, CHUNKS, STAGES,
        )  # fmt: skip
        usable = tl.load(scalars + USABLE).to(tl.int32) + tl.zeros([BLOCK_N], tl.int32)
        answerable = there & (bound == bound) & (usable > 0)
        certain = (best - second > 2 * bound) & (best - 2 * bound > far_floor)
        code = tl.where(answerable, index, -1).to(tl.int64)
        uncertified = (answerable & (certain == 0)).to(tl.int32)
        if tl.sum(uncertified) > 0:
            for i in range(BLOCK_N):
                if tl.sum(tl.where(local == i, uncertified, 0)) > 0:
                    row = residual + (tl.program_id(0).to(tl.int64) * BLOCK_N + i) * dim
                    found = nearest(row, codebook, norms, size, dim, True, False, DEFINE_K, DEFINE_D)
                    code = tl.where(local == i, found, code)
        tl.store(out + rows * stages + stage, code, there)
        # Nothing reads the residual of this stage any more.
        tl.debug_barrier()
        for c in range(CHUNKS):
            d = c * BLOCK_D + inner
            there_d = there[:, None] & (d < dim)[None, :]
            kept = tl.load(residual + at[:, None] + d[None, :], there_d, other=0.0)
            codes = tl.load(codebook + code[:, None] * dim + d[None, :], there_d & (code >= 0)[:, None], other=0.0).to(
                tl.float32
            )
            tl.store(residual + at[:, None] + d[None, :], kept - codes, there_d)
        tl.debug_barrier()
        codebook += long * size * dim
        center += dim
        scalars += SCALARS
        norms += 2 * size
        maxima += MAXIMA
        high += long * padded * columns
        low += long * padded * columns
        half += padded


def residual_search(x: Tensor, codebooks: Sequence[Tensor], *, metric: str = "l2") -> Tensor:
    """`fastvq.residual_search`. Nothing here waits for the device.

    The kernel serves stages of one size by their distance; others, and metric "dot", take one `search` a stage.
    """
    stack = joined(codebooks)
    # Of float64 vectors, the first stage searches them, the others their residuals in float32.
    if metric != "l2" or stack is None or torch.float64 in (x.dtype, stack.dtype):
        return search_stages(search, x, codebooks, metric=metric)
    return _search_stack(x, stack)


def _search_stack(x: Tensor, codebooks: Tensor) -> Tensor:
    n, dim = x.shape
    stages, size, _ = codebooks.shape
    columns = columns_of(dim)
    most = max(LEAST_ROWS, SCRATCH // (4 * columns + 4 * dim))
    if n > most:
        return torch.cat([_search_stack(part, codebooks) for part in x.split(most)])
    indices = x.new_empty(n, stages, dtype=torch.int64)
    if n == 0:
        return indices
    codes = codebooks.contiguous()
    with torch.cuda.device_of(x):
        residual = x.to(torch.float32, copy=True).contiguous()
        config = launch.scan(x.device, columns, 3)
        block_d = min(config.block_d, 32)
        frame = prepare(codes, metric="l2", wide=False, block_codes=config.block_k)
        scratch = x.new_empty(2, n, columns, dtype=torch.float16)
        _residual_search[(triton.cdiv(n, config.block_n),)](
            residual, codes, frame.center, frame.scalars, frame.norms, frame.maxima, frame.high, frame.low, frame.half,
            frame.folded, *scratch, indices, n, size, dim, launch.root_of(dim), frame.half.shape[1], stages,
            BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_D=block_d, CHUNKS=columns // block_d,
            STAGES=config.num_stages, DEFINE_K=DEFINE_K, DEFINE_D=DEFINE_D, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return indices


def aot_cases() -> list[Case]:
    """For `kernels/aot.py`."""
    cases = []
    for dim in (1, 8, 64, 256):
        columns = columns_of(dim)
        config = next(c for (t, most), c in launch.SCANS["sm_80"].items() if t == 3 and columns <= most)
        block_d = min(config.block_d, 32)
        constants = {
            "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_D": block_d, "CHUNKS": columns // block_d,
            "STAGES": config.num_stages, "DEFINE_K": DEFINE_K, "DEFINE_D": DEFINE_D,
        }  # fmt: skip
        options = {"num_warps": WARPS, "enable_fp_fusion": False, "matrix": True, "exact": True}
        ones = {"n": 1, "size": 1, "dim": 1, "stages": 1} if dim == 1 else {}
        cases.append(case(_residual_search, constants | ones, options | (ONES if ones else {})))
    return cases
