"""Length of a Huffman code, for comparison: it spends whole bits on each symbol, unlike a range coder.

No file uses this code, so it stays apart from the modules that write and read files.
"""

from __future__ import annotations

import heapq

import numpy as np

from .tree import Ints


def huffman_bits(symbols: Ints) -> int:
    """Return the total bits of the symbols under the best prefix code for their frequencies, without its table.

    A symbol costs one bit for each merge that it takes part in, so the merged weights add up to the length.

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
