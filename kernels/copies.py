"""Codes that equal an earlier code of their codebook, which therefore never win: found by a table of hashes.

A finite code enters its number in some slots of the table, which its hash names, and the lowest number in a slot stays,
whatever the order of the programs. None of its slots then names a code after the first of its copies, and the latest of
the codes named is this first copy, unless each slot has an earlier code with other elements. A comparison of all
elements decides, so that such a collision hides a copy and never drops a code that has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

PROBES = tl.constexpr(4)
"""Slots of a code."""
SLOTS_EACH = 16
"""Slots of the table for each code: (PROBES / SLOTS_EACH)^PROBES, 0.4 %, is the largest probability of a collision."""
MOST_SLOTS = 2**28
_ODD = tl.constexpr(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: its multiples have pseudo-random bits."""
_LOW = tl.constexpr(0xFFFFFFFF)


def slots_for(size: int) -> int:
    """Return the number of slots of a head's table."""
    return min(SLOTS_EACH * size, MOST_SLOTS)


@triton.jit
def _random(numbers):
    """Return pseudo-random bits for uint64 numbers."""
    numbers = numbers * _ODD
    numbers = (numbers ^ (numbers >> 29)) * _ODD
    return numbers ^ (numbers >> 32)


@triton.jit
def hash_of(codes, d):
    """Return the contribution of columns d to the hashes of float64 codes [ROWS, columns]: the sum of all is the hash.

    It multiplies both halves of an element's bits by a pseudo-random number for each column. -0.0 counts as 0.0.
    """
    bits = tl.where(codes == 0, 0.0, codes).to(tl.uint64, bitcast=True)
    column = 2 * d.to(tl.uint64)[None, :]
    return tl.sum((bits >> 32) * _random(column + 1) + (bits & _LOW) * _random(column + 2), 1)


@triton.jit
def _slot(hashes, probe: tl.constexpr, slots):
    mixed = _random(hashes + 1)
    place = ((mixed >> 32) + probe * ((mixed & _LOW) | 1)) & _LOW
    return ((place * slots.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def enter(table, hashes, k, size, slots, chosen):
    """Enter the chosen codes k, as size - k, so that the table begins as zeros and the largest number stays."""
    for probe in tl.static_range(PROBES):
        slot = table + _slot(hashes, probe, slots)
        # Numbers only grow: one that is large enough already saves an atomic operation, which copies would queue for.
        seen = tl.load(slot, chosen, other=0, volatile=True)
        tl.atomic_max(slot, size - k, chosen & (seen < size - k), sem="relaxed")


@triton.jit
def equal_earlier(table, hashes, codebook, k, size, dim, slots, chosen, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return which of the chosen codes k, all entered, equal an earlier code of the codebook (size, dim)."""
    number = tl.zeros_like(k) + size
    for probe in tl.static_range(PROBES):
        number = tl.minimum(number, tl.load(table + _slot(hashes, probe, slots), chosen, other=0))
    first = size - number
    possible = chosen & (first < k)
    if tl.max(possible.to(tl.int32)) > 0:
        different = tl.zeros([ROWS], tl.int32)
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            there = possible[:, None] & (d < dim)[None, :]
            own = tl.load(codebook + k.to(tl.int64)[:, None] * dim + d[None, :], there, other=0.0)
            earlier = tl.load(codebook + first.to(tl.int64)[:, None] * dim + d[None, :], there, other=0.0)
            different += tl.sum((own.to(tl.float64) != earlier.to(tl.float64)).to(tl.int32), 1)
        possible = possible & (different == 0)
    return possible
