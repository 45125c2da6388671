"""What a Huffman code would need, for the record: it spends whole bits on each symbol, a range coder doesn't."""

from __future__ import annotations

import heapq

import numpy as np

from .tree import Ints


def huffman_bits(symbols: Ints) -> int:
    """Bits of all symbols under the best prefix code of their frequencies, its table not included.

    A symbol costs a bit for each merge that it takes part in, so the merged weights add up to the length.
    Source: Huffman, A Method for the Construction of Minimum-Redundancy Codes, 1952.
    """
    weights = np.unique(symbols, return_counts=True)[1].tolist()
    heapq.heapify(weights)
    total = 0
    while len(weights) > 1:
        merged = heapq.heappop(weights) + heapq.heappop(weights)
        total += merged
        heapq.heappush(weights, merged)
    return total
