"""The codebook as the matrix units see it: centered, scaled, split into float16 parts and packed into tiles.

Four launches and no wait: column sums and a table of the codes; norms, and which codes are copies; one program that
decides on center, scale and far codes; packing. The terms are those of docs/exactness.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .copies import enter, equal_earlier, hash_of, slots_for
from .numbers import LOW_SCALE, exponent_of, is_finite, power_of_two, split, to_float16
from .signatures import ONES, Case, case

FAR = tl.constexpr(8.0)
"""Times the geometric mean of the norms, and a code is far from the others."""
FAR_SHARE = tl.constexpr(64)
"""At most one code in this number is far, and left out of the scan."""
TARGET = tl.constexpr(7)
"""The longest code is scaled to [2^6, 2^7): half its square fits float16, and an element may be 2^-20 of it before it
is one of float16's subnormals."""
LONGEST = tl.constexpr(1.01 * 2.0**7)
"""Longer than that is only a code that float32 can't scale down as far, or one that overflowed."""

LOWEST, LOWEST_WIDE = tl.constexpr(-126), tl.constexpr(-490)
"""The smallest exponents of the scale of a row, in float32 and float64."""

# Scalars of a head, float64, written by `_decide`.
USABLE, CENTERED, THRESHOLD, EXPONENT, FAR_NORM = (tl.constexpr(i) for i in range(5))
SCALARS = tl.constexpr(8)
# Maxima over the packed codes of a head, float32, written by `_pack`.
LENGTH, HIGH, LOW, HIGH_REST, LOW_REST, HALF, FOLD_REST = (tl.constexpr(i) for i in range(7))
MAXIMA = tl.constexpr(8)

NONE = tl.constexpr(-1.0)
"""The norm of a code that is never the nearest: it isn't finite, or equals an earlier one."""
TAME = tl.constexpr(1e150)
"""Beyond this length the definition itself may overflow, and no bound is promised."""

PARTS = 128
"""The largest number of programs that share a codebook."""
FOLD_COLUMNS = tl.constexpr(3)
"""For a scan in one float16 product, half the square of a code is three float16 numbers in columns of its own, inside
the padding or beside it; a row holds its negative scale there. The matrix unit then does what else would be an
instruction for each score, and these are what a scan runs short of."""
NEVER = tl.constexpr(65504.0)
"""In these columns, of a code that isn't scanned: an infinity would make a NaN where a row holds zeros."""
FOLD_SHRINK = tl.constexpr(0.125)
"""A row scaled down further can't rule such a code out: 3 NEVER / 8 exceeds 2^14 + 2^10, the worst of scores."""


@triton.jit
def _sums(
    codebook, sums, hashes, table, size, dim, part_codes, slots,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the columns over one part of the codes, and enter these in the table of copies.

    A non-finite code contributes its finite elements, and a copy all of its own: any center is right, and a good one is
    near the mean.
    """
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    codebook += head * size * dim
    hashes += head * size
    table += head * slots
    sums += (head * tl.num_programs(0) + part) * dim
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    end = tl.minimum((part + 1) * part_codes, size)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], dtype)
        for first in range(part * part_codes, end, ROWS):
            k = first + tl.arange(0, ROWS)
            there = (k < end)[:, None] & (d < dim)[None, :]
            codes = tl.load(codebook + k.to(tl.int64)[:, None] * dim + d[None, :], there, other=0.0).to(dtype)
            total += tl.sum(tl.where(is_finite(codes), codes, 0.0), 0)
        tl.store(sums + d, total, d < dim)
    # A hash takes all columns of a code. Its elements come from the cache.
    for first in range(part * part_codes, end, ROWS):
        k = first + tl.arange(0, ROWS)
        code_hash = tl.zeros([ROWS], tl.uint64)
        non_finite = tl.zeros([ROWS], tl.int32)
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            there = (k < end)[:, None] & (d < dim)[None, :]
            codes = tl.load(codebook + k.to(tl.int64)[:, None] * dim + d[None, :], there, other=0.0).to(tl.float64)
            non_finite += tl.sum((is_finite(codes) == 0).to(tl.int32), 1)
            code_hash += hash_of(codes, d)
        tl.store(hashes + k, code_hash.to(tl.int64, bitcast=True), k < end)
        enter(table, code_hash, k, size, slots, (k < end) & (non_finite == 0))


@triton.jit
def _norms(
    codebook, sums, hashes, table, center, norms, size, dim, part_codes, parts, slots,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Norms of the codes, as they are and about the mean; NONE for a non-finite code or a copy.

    Part 0 writes the mean.
    """
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    codebook += head * size * dim
    hashes += head * size
    table += head * slots
    sums += head * parts * dim
    norms += head * 2 * size
    end = tl.minimum((part + 1) * part_codes, size)
    for first in range(part * part_codes, end, ROWS):
        k = first + tl.arange(0, ROWS)
        raw = tl.zeros([ROWS], tl.float64)
        centered = tl.zeros([ROWS], tl.float64)
        non_finite = tl.zeros([ROWS], tl.int32)
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mean = tl.zeros([BLOCK_D], sums.dtype.element_ty)
            for p in range(parts):
                mean += tl.load(sums + p * dim + d, d < dim, other=0.0)
            mean = mean / size
            if (part == 0) & (first == 0):
                tl.store(center + head * dim + d, mean, d < dim)
            there = (k < end)[:, None] & (d < dim)[None, :]
            codes = tl.load(codebook + k.to(tl.int64)[:, None] * dim + d[None, :], there, other=0.0).to(tl.float64)
            moved = codes - tl.where(d < dim, mean, 0.0).to(tl.float64)[None, :]
            non_finite += tl.sum((is_finite(codes) == 0).to(tl.int32), 1)
            raw += tl.sum(codes * codes, 1)
            centered += tl.sum(moved * moved, 1)
        finite = (k < end) & (non_finite == 0)
        code_hash = tl.load(hashes + k, k < end, other=0).to(tl.uint64, bitcast=True)
        copies = equal_earlier(table, code_hash, codebook, k, size, dim, slots, finite, ROWS, BLOCK_D)
        usable = finite & (copies == 0)
        tl.store(norms + k, tl.where(usable, tl.sqrt(raw), NONE), k < end)
        centered = tl.where(centered < float("inf"), tl.sqrt(centered), float("inf"))
        tl.store(norms + size + k, tl.where(usable, centered, NONE), k < end)


@triton.jit
def _threshold(norms, size, L2: tl.constexpr, BLOCK: tl.constexpr):
    """Return (norm above which a code is far, longest of the others, shortest far one, usable codes).

    The first is infinity if no code is far. Only distances have far codes: by inner products a long code is the
    nearest of many rows.
    """
    exponents = tl.zeros([BLOCK], tl.float64)
    moved = tl.zeros([BLOCK], tl.int32)
    usable = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        k = first + tl.arange(0, BLOCK)
        norm = tl.load(norms + k, k < size, other=NONE)
        # The limit of far codes need not be precise: the exponent serves as the logarithm.
        exponents += tl.where(norm > 0, exponent_of(norm), 0).to(tl.float64)
        moved += (norm > 0).to(tl.int32)
        usable += (norm >= 0).to(tl.int32)
    mean = tl.sum(exponents) / tl.maximum(tl.sum(moved), 1)
    limit = FAR * power_of_two(mean.to(tl.int32), tl.float64)
    beyond = tl.zeros([BLOCK], tl.int32)
    reach_near = tl.zeros([BLOCK], tl.float64)
    reach = tl.zeros([BLOCK], tl.float64)
    nearest_far = tl.full([BLOCK], float("inf"), tl.float64)
    for first in range(0, size, BLOCK):
        k = first + tl.arange(0, BLOCK)
        norm = tl.load(norms + k, k < size, other=NONE)
        far = norm > limit
        beyond += far.to(tl.int32)
        reach_near = tl.maximum(reach_near, tl.where(far, 0.0, norm))
        reach = tl.maximum(reach, norm)
        nearest_far = tl.minimum(nearest_far, tl.where(far, norm, float("inf")))
    few = tl.sum(beyond) <= (tl.sum(usable) // FAR_SHARE if L2 else -1)
    nearest_far = tl.where(few, tl.min(nearest_far), float("inf"))
    return (
        tl.where(few, limit, float("inf")),
        tl.where(few, tl.max(reach_near), tl.max(reach)),
        nearest_far,
        tl.sum(usable),
    )


@triton.jit
def _decide(norms, scalars, center, size, dim, L2: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Decide which norms are usable, the scale, and which codes are outliers, with one program a head."""
    head = tl.program_id(0).to(tl.int64)
    norms += head * 2 * size
    scalars += head * SCALARS
    limit, reach, nearest_far, usable = _threshold(norms, size, L2, BLOCK)
    if L2:
        about_mean = _threshold(norms + size, size, L2, BLOCK)
        pays = (about_mean[1] < 0.5 * reach) & (usable > 1)
        limit = tl.where(pays, about_mean[0], limit)
        reach = tl.where(pays, about_mean[1], reach)
        nearest_far = tl.where(pays, about_mean[2], nearest_far)
    else:
        pays = size < 0
    tl.store(scalars + CENTERED, tl.where(pays, 1.0, 0.0))
    for d0 in range(0, dim, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        mean = tl.load(center + head * dim + d, d < dim, other=0.0)
        tl.store(center + head * dim + d, tl.where(pays, mean, 0.0), d < dim)
    largest: tl.constexpr = 1000 if WIDE else 126
    exponent = tl.minimum(tl.maximum(TARGET - exponent_of(reach), -largest), largest)
    # A code without others to tell it from wins at any scale, and at the smallest no row is too long for it.
    exponent = tl.where(usable > 1, exponent, LOWEST_WIDE if WIDE else LOWEST)
    tl.store(scalars + USABLE, usable.to(tl.float64))
    tl.store(scalars + THRESHOLD, limit)
    tl.store(scalars + EXPONENT, exponent.to(tl.float64))
    tl.store(scalars + FAR_NORM, nearest_far * power_of_two(exponent, tl.float64))


@triton.jit
def _raise(maxima, which: tl.constexpr, values):
    """Take the atomic maximum of non-negative float32 values, whose bits as integers keep their order."""
    tl.atomic_max(maxima + which, tl.max(values).to(tl.int32, bitcast=True))


@triton.jit
def _fold(codes, half_square, near, d, first, L2: tl.constexpr):
    """Return (codes with half their squares in the columns from `first` on, the rounding errors of these)."""
    rest = half_square if L2 else half_square * 0
    for part in tl.static_range(FOLD_COLUMNS):
        piece = to_float16(rest)
        rest -= piece.to(tl.float32)
        codes = tl.where((d == first + part)[None, :], tl.where(near, piece, NEVER).to(tl.float16)[:, None], codes)
    return codes, tl.abs(rest)


@triton.jit
def _pack(
    codebook, center, norms, scalars, high, low, half, folded, maxima, size, dim, padded,
    L2: tl.constexpr, WIDE: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write the float16 parts of the scaled codes, half their squares, and the maxima that the bound needs.

    The parts are (padded, CHUNKS BLOCK_D), the halves (padded,). A code that is not scanned gets zeros and half a
    square of infinity.
    """
    head = tl.program_id(1).to(tl.int64)
    codebook += head * size * dim
    norms += head * 2 * size
    scalars += head * SCALARS
    maxima += head * MAXIMA
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = (head * padded + k).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    scale = power_of_two(tl.load(scalars + EXPONENT).to(tl.int32), dtype)
    centered = tl.load(scalars + CENTERED) > 0
    norm = tl.load(norms + tl.where(centered, size, 0) + k, k < size, other=NONE)
    tame = norm < TAME
    near = (norm >= 0) & (norm <= tl.load(scalars + THRESHOLD)) & tame
    half_square = tl.zeros([ROWS], tl.float32)
    length, high_square, low_square, high_rest, low_rest = (
        half_square,
        half_square,
        half_square,
        half_square,
        half_square,
    )
    for c in tl.static_range(CHUNKS):
        d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        there = near[:, None] & (d < dim)[None, :]
        codes = tl.load(codebook + k.to(tl.int64)[:, None] * dim + d[None, :], there, other=0.0).to(dtype)
        mean = tl.load(center + head * dim + d, d < dim, other=0.0).to(dtype)
        scaled = tl.where(there, (codes - mean[None, :]) * scale, 0.0).to(tl.float32)
        h, low_part, h_rest, l_rest = split(scaled)
        half_square += 0.5 * tl.sum(scaled * scaled, 1)
        high_square += tl.sum(h.to(tl.float32) * h.to(tl.float32), 1)
        low_square += tl.sum(low_part.to(tl.float32) * low_part.to(tl.float32), 1)
        high_rest += tl.sum(h_rest * h_rest, 1)
        low_rest += tl.sum(l_rest * l_rest, 1)
        if not BESIDE:
            h, fold_rest = _fold(h, half_square, near, d, dim, L2)
            _raise(maxima, FOLD_REST, fold_rest)
        at = place[:, None] * (CHUNKS * BLOCK_D) + d[None, :]
        tl.store(high + at, h, (k < padded)[:, None])
        tl.store(low + at, low_part, (k < padded)[:, None])
    length = tl.sqrt(2 * half_square)
    if BESIDE:
        d = tl.arange(0, 16)
        h, fold_rest = _fold(tl.zeros([ROWS, 16], tl.float16), half_square, near, d, 0, L2)
        _raise(maxima, FOLD_REST, fold_rest)
        tl.store(folded + place[:, None] * 16 + d[None, :], h, (k < padded)[:, None])
    if not L2:
        half_square = half_square * 0
    tl.store(half + place, tl.where(near, half_square, float("inf")), k < padded)
    # A code beyond all measure takes the bound away from every row.
    _raise(maxima, LENGTH, tl.where((norm >= 0) & (tame == 0), float("inf"), length))
    _raise(maxima, HIGH, tl.sqrt(high_square))
    _raise(maxima, LOW, tl.sqrt(low_square) / LOW_SCALE)
    _raise(maxima, HIGH_REST, tl.sqrt(high_rest))
    _raise(maxima, LOW_REST, tl.sqrt(low_rest))
    _raise(maxima, HALF, half_square)


@dataclass(frozen=True)
class Frame:
    """A codebook made ready to be searched, on its device."""

    center: Tensor  # [H, D] float32, or float64 beside float64 data; zero where centering doesn't pay
    scalars: Tensor  # [H, SCALARS] float64
    norms: Tensor  # [H, 2, K] float64, as they are and about the mean; NONE of a code that is never the nearest
    maxima: Tensor  # [H, MAXIMA] float32, as int32
    high: Tensor  # [H, padded, columns] float16
    low: Tensor  # [H, padded, columns] float16
    half: Tensor  # [H, padded] float32
    folded: Tensor  # [H, padded, 16] float16, where the parts of half the squares stand beside the codes
    beside: bool


def columns_of(dim: int) -> int:
    """Return the columns of a packed code.

    At least 16, which matrix units multiply; a power of two up to 256, and then a multiple of 64.
    """
    return max(16, triton.next_power_of_2(dim)) if dim <= 256 else 64 * triton.cdiv(dim, 64)


def _rows(block_d: int) -> tuple[int, int]:
    """Codes taken at once by the kernels that sum in float64, and by the one that packs."""
    return max(16, 1024 // block_d), min(64, 4096 // block_d)


def prepare(codebook: Tensor, *, metric: str, wide: bool, block_codes: int) -> Frame:
    """Return the frame of codebook (H, K, D), contiguous, padded to a multiple of `block_codes`.

    `wide` says that an argument of the search is float64.
    """
    heads, size, dim = codebook.shape
    columns = columns_of(dim)
    block_d = min(columns, 64)
    beside = columns > block_d or columns - dim < FOLD_COLUMNS.value
    padded = triton.cdiv(size, block_codes) * block_codes
    rows, packed_rows = _rows(block_d)
    part_codes = max(rows, triton.cdiv(triton.cdiv(size, PARTS), rows) * rows)
    parts = triton.cdiv(size, part_codes)

    slots = slots_for(size)
    dtype = torch.float64 if wide else torch.float32
    sums = codebook.new_empty(heads, parts, dim, dtype=dtype)
    hashes = codebook.new_empty(heads, size, dtype=torch.int64)
    # One launch fills both.
    maxima, table = codebook.new_zeros(heads * (MAXIMA.value + slots), dtype=torch.int32).split(
        (heads * MAXIMA.value, heads * slots)
    )
    frame = Frame(
        center=codebook.new_empty(heads, dim, dtype=dtype),
        scalars=codebook.new_empty(heads, SCALARS.value, dtype=torch.float64),
        norms=codebook.new_empty(heads, 2, size, dtype=torch.float64),
        maxima=maxima.view(heads, MAXIMA.value),
        high=codebook.new_empty(heads, padded, columns, dtype=torch.float16),
        low=codebook.new_empty(heads, padded, columns, dtype=torch.float16),
        half=codebook.new_empty(heads, padded, dtype=torch.float32),
        folded=codebook.new_empty(heads, padded if beside else 0, 16, dtype=torch.float16),
        beside=beside,
    )
    l2 = metric == "l2"
    _sums[(parts, heads)](
        codebook, sums, hashes, table, size, dim, part_codes, slots, WIDE=wide, ROWS=rows, BLOCK_D=block_d
    )
    _norms[(parts, heads)](
        codebook, sums, hashes, table, frame.center, frame.norms, size, dim, part_codes, parts, slots,
        ROWS=rows, BLOCK_D=block_d,
    )  # fmt: skip
    _decide[(heads,)](frame.norms, frame.scalars, frame.center, size, dim, L2=l2, WIDE=wide, BLOCK=1024)
    _pack[(triton.cdiv(padded, packed_rows), heads)](
        codebook, frame.center, frame.norms, frame.scalars, frame.high, frame.low, frame.half, frame.folded,
        frame.maxima, size, dim, padded, L2=l2, WIDE=wide, BESIDE=beside, ROWS=packed_rows, BLOCK_D=block_d,
        CHUNKS=columns // block_d,
    )  # fmt: skip
    return frame


def aot_cases() -> list[Case]:
    """For `kernels/aot.py`."""
    cases = []
    shapes = [("float32", dim) for dim in (1, 8, 64, 256)]
    for dtype, dim in [*shapes, ("bfloat16", 64), ("float64", 64)]:
        wide, columns = dtype == "float64", columns_of(dim)
        block_d = min(columns, 64)
        rows, packed_rows = _rows(block_d)
        beside = columns > block_d or columns - dim < FOLD_COLUMNS.value
        pack = {"L2": True, "WIDE": wide, "BESIDE": beside, "CHUNKS": columns // block_d, "ROWS": packed_rows}
        ones = {"size": 1, "dim": 1, "parts": 1} if dim == 1 else {}
        cases += [
            case(kernel, {"BLOCK_D": block_d, **constants, **ones}, ONES if ones else {}, dtype=dtype)
            for kernel, constants in (
                (_sums, {"WIDE": wide, "ROWS": rows}),
                (_norms, {"ROWS": rows}),
                (_pack, pack),
            )
        ]
    return [*cases, *(case(_decide, {"L2": l2, "WIDE": not l2, "BLOCK": 1024}, {}) for l2 in (True, False))]
