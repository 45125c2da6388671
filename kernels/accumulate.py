"""Counts and sums of the rows that share a code, without float atomics: equal to the bit at every run.

    sort        stable, by index: the rows of a code stand side by side, in ascending order
    _bounds     where each code begins among them, by binary search; the counts
    _pieces     float64 sums of at most PIECE rows of one code
    _merge      for the codes with more than one piece, the pieces in ascending order

Pieces are numbered without a search and without knowing how many there are. Code k has its rows at the sorted positions
o_k to o_{k+1}. It has a first piece, and one more for each multiple c PIECE with o_k < c PIECE <= o_{k+1}, c = 1 to
N / PIECE: c belongs to the code at position c PIECE - 1, of which it is piece j = c - floor(o_k / PIECE), the rows from
o_k + j PIECE on. Of the last there may be none. So the sum of a code depends on nothing but its own rows.

Memory: some 24 N bytes for the sort and 16 N D / PIECE for the pieces. Moved, of float32 rows: 4 N D bytes read and
4 K D written, whatever the indices are. In torch operations a float64 copy moves 12 N D, and index_add_ reads it and
adds to float64 sums atomically, another 24 N D.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range

PIECE = 256
"""Rows of a piece: enough that a piece's float64 sum is 1/128 of the traffic, few enough for one code to fill a GPU."""
TILE = 2048
BLOCK_K = 256
NUM_WARPS = 4
ASSERTING: dict[str, Any] = {"debug": True, "sanitize_overflow": False}
"""Options under which a kernel's device_assert is compiled, and nothing else that debugging would bring."""


@triton.jit
def _bounds(keys, starts, counts, n, size, steps, BLOCK_K: tl.constexpr):
    """Write the bounds of each code's rows in the sorted keys (n,).

    starts (K + 1,) int64 takes the first position that holds k or more, counts (K,) the number of rows.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = _position_of(k, keys, n, steps)
    end = _position_of(k + 1, keys, n, steps)
    tl.store(starts + k, first, k <= size)
    tl.store(counts + k, (end - first).to(tl.float32), k < size)
    # The device itself asserts, so nothing waits: an index out of range sorts before the first code or after the last.
    tl.device_assert((tl.load(keys) >= -1) & (tl.load(keys + n - 1) < size), "indices: must lie in [-1, K)")


@triton.jit
def _position_of(code, keys, n, steps):
    """Return the number of the ascending keys (n,) below `code`; 2^steps > n."""
    low = tl.zeros_like(code).to(tl.int64)
    high = low + n
    for _ in range(steps):
        middle = (low + high) // 2
        undecided = low < high
        smaller = undecided & (tl.load(keys + middle, undecided, other=0) < code)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(undecided & (smaller == 0), middle, high)
    return low


@triton.jit
def _pieces(
    x, order, keys, starts, sums, first_pieces, later_pieces, size, dim,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the first pieces of all codes, then piece c = 1, 2, ... of the code it belongs to.

    x is (n, dim), order and keys are (n,). A code's only piece goes to sums (K, dim) float32. Of others, float64 sums
    go to first_pieces (n / PIECE, dim), at the lowest c of the code, and to later_pieces (n / PIECE, dim), at their
    own c; both begin at c = 1.
    """
    place = tl.program_id(0)
    later = place >= size
    crossing = (place - size + 1).to(tl.int64)
    code = place.to(tl.int64)
    if later:
        code = tl.load(keys + crossing * PIECE - 1).to(tl.int64)
    if (code < 0) | (code >= size):
        return
    start = tl.load(starts + code)
    end = tl.load(starts + code + 1)
    lowest = start // PIECE + 1
    begin = start
    if later:
        begin += (crossing - lowest + 1) * PIECE
    last = tl.minimum(begin + PIECE, end)

    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float64)
    for position in range(begin, last, ROWS):
        at = position + tl.arange(0, ROWS)
        row = tl.load(order + at, at < last, other=0)
        there = (at < last)[:, None] & (d < dim)[None, :]
        total += tl.load(x + row[:, None] * dim + d[None, :], there, other=0.0).to(tl.float64)
    piece = tl.sum(total, 0)
    if later:
        tl.store(later_pieces + (crossing - 1) * dim + d, piece, d < dim)
    elif end // PIECE < lowest:
        tl.store(sums + code * dim + d, piece.to(tl.float32), d < dim)
    else:
        tl.store(first_pieces + (lowest - 1) * dim + d, piece, d < dim)


@triton.jit
def _merge(
    keys, starts, first_pieces, later_pieces, sums, size, dim,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program c adds the pieces of the code whose lowest crossing is c."""
    crossing = tl.program_id(0).to(tl.int64) + 1
    code = tl.load(keys + crossing * PIECE - 1).to(tl.int64)
    if (code < 0) | (code >= size):
        return
    if tl.load(starts + code) // PIECE + 1 != crossing:
        return
    last = tl.load(starts + code + 1) // PIECE
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float64)
    for first in range(crossing, last + 1, ROWS):
        c = first + tl.arange(0, ROWS)
        there = (c <= last)[:, None] & (d < dim)[None, :]
        total += tl.load(later_pieces + (c - 1)[:, None] * dim + d[None, :], there, other=0.0)
    head = tl.load(first_pieces + (crossing - 1) * dim + d, d < dim, other=0.0)
    tl.store(sums + code * dim + d, (head + tl.sum(total, 0)).to(tl.float32), d < dim)


def tile(dim: int) -> tuple[int, int]:
    """(rows, columns) that a program adds at once."""
    columns = min(128, triton.next_power_of_2(dim))
    return min(64, TILE // columns), columns


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """`fastvq.accumulate`. Nothing here waits for the device; an index out of range makes the device assert."""
    n, dim = x.shape
    if n == 0:
        return x.new_zeros(codebook_size, dtype=torch.float32), x.new_zeros(codebook_size, dim, dtype=torch.float32)
    check_index_range(indices, codebook_size)
    x = x.contiguous()
    with torch.cuda.device_of(x):
        # Narrow keys sort in fewer passes. The clamp keeps an index out of range out of range.
        narrow = torch.int16 if codebook_size < 2**15 else torch.int32 if codebook_size < 2**31 else torch.int64
        keys, order = torch.sort(indices.clamp(-2, codebook_size).to(narrow), stable=True)
        starts = indices.new_empty(codebook_size + 1)
        counts = x.new_empty(codebook_size, dtype=torch.float32)
        sums = x.new_empty(codebook_size, dim, dtype=torch.float32)
        _bounds[(triton.cdiv(codebook_size + 1, BLOCK_K),)](
            keys, starts, counts, n, codebook_size, n.bit_length(), BLOCK_K=BLOCK_K, num_warps=NUM_WARPS, **ASSERTING
        )
        if dim == 0:
            return counts, sums
        crossings = n // PIECE
        first_pieces, later_pieces = x.new_empty(2, crossings, dim, dtype=torch.float64)
        rows, block_d = tile(dim)
        blocks = triton.cdiv(dim, block_d)
        _pieces[(codebook_size + crossings, blocks)](
            x, order, keys, starts, sums, first_pieces, later_pieces, codebook_size, dim,
            PIECE=PIECE, ROWS=rows, BLOCK_D=block_d, num_warps=NUM_WARPS,
        )  # fmt: skip
        if crossings:
            _merge[(crossings, blocks)](
                keys, starts, first_pieces, later_pieces, sums, codebook_size, dim,
                PIECE=PIECE, ROWS=rows, BLOCK_D=block_d, num_warps=NUM_WARPS,
            )  # fmt: skip
    return counts, sums


def aot_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return the shipped cases for `fastvq.kernels.aot`: kernel, types, constants and options."""
    hot = {"num_warps": NUM_WARPS, "hot": True}
    keys = {"keys": "*i16", "starts": "*i64"}
    ends = {"size": "i32", "dim": "i32:16"}
    cases: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    for key in ("*i16", "*i32"):
        types = {"keys": key, "starts": "*i64", "counts": "*fp32", "n": "i32", "size": "i32", "steps": "i32"}
        cases.append((_bounds, types, {"BLOCK_K": BLOCK_K}, hot | ASSERTING))
    for dim in (16, 64, 1024):
        rows, block_d = tile(dim)
        constants = {"PIECE": PIECE, "ROWS": rows, "BLOCK_D": block_d}
        pieces = {"first_pieces": "*fp64", "later_pieces": "*fp64"}
        for dtype in ("*fp32", "*bf16"):
            types = {"x": dtype, "order": "*i64", **keys, "sums": "*fp32", **pieces, **ends}
            cases.append((_pieces, types, constants, hot))
        cases.append((_merge, {**keys, **pieces, "sums": "*fp32", **ends}, constants, hot))
    return cases
