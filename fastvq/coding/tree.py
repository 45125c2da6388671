"""Symbols as binary decisions: each symbol is the path to a leaf of a binary tree, from the highest bit down.

A node is named by its depth and the bits so far, node = 2^depth + prefix, so the nodes are 1 ... 2^depths - 1. If the
alphabet is not a power of two, some right children hold no symbol, and their parent needs no decision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def depths(alphabet: int) -> int:
    """Return the largest number of decisions of a symbol."""
    return (alphabet - 1).bit_length()


def branching_mask(prefix: Ints, depth: int, alphabet: int) -> Mask:
    """Return the mask of the nodes at `depth`, given by `prefix`, whose children both hold symbols."""
    below = depths(alphabet) - depth - 1
    return ((2 * prefix + 1) << below) < alphabet


def node_counts(symbols: Ints, alphabet: int) -> tuple[Ints, Ints]:
    """Return the number of symbols that pass each node, and of those that turn right there; both (2^depths,)."""
    leaves = 1 << depths(alphabet)
    passing = np.zeros(2 * leaves, np.int64)
    passing[leaves:] = np.bincount(symbols, minlength=leaves)
    for depth in range(depths(alphabet) - 1, -1, -1):
        level = slice(1 << depth, 2 << depth)
        passing[level] = passing[2 << depth : 4 << depth].reshape(-1, 2).sum(1)
    right = np.zeros(leaves, np.int64)
    right[1:] = passing[3::2]
    return passing[:leaves], right


def visit_nodes(passing: Ints, right: Ints, alphabet: int, number: Callable[[int, int], int]) -> None:
    """Set right[node] = number(right[node], passing[node]) from the root down, and the children's counts accordingly.

    Only nodes that symbols pass and that need a decision are visited.
    """
    for depth in range(depths(alphabet)):
        start = 1 << depth
        prefixes = np.flatnonzero(passing[start : 2 * start])
        for prefix, branches in zip(prefixes.tolist(), branching_mask(prefixes, depth, alphabet).tolist(), strict=True):
            node = start + prefix
            right[node] = number(int(right[node]), int(passing[node])) if branches else 0
            if 2 * node < len(passing):
                passing[2 * node : 2 * node + 2] = passing[node] - right[node], right[node]


def walk_few(
    count: int,
    alphabet: int,
    decide: Callable[[list[int], list[int], list[int] | None], list[int]],
    truth: list[int] | None = None,
) -> list[int]:
    """Return the symbols as `walk` does, in lists; `decide` is given the places of the branching symbols as a list."""
    prefixes = [0] * count
    for below in range(depths(alphabet) - 1, -1, -1):
        branching = [place for place, prefix in enumerate(prefixes) if (2 * prefix + 1) << below < alphabet]
        prefixes = [2 * prefix for prefix in prefixes]
        if branching:
            nodes = [(1 << depths(alphabet) - below - 1) + prefixes[place] // 2 for place in branching]
            bits = None if truth is None else [truth[place] >> below & 1 for place in branching]
            for place, right in zip(branching, decide(nodes, branching, bits), strict=True):
                prefixes[place] += right
    return prefixes


def walk(
    count: int, alphabet: int, decide: Callable[[Ints, Mask, Ints | None], Ints], truth: Ints | None = None
) -> Ints:
    """Return the symbols (count,) that the decisions lead to; the decisions at one depth are taken together.

    Args:
        decide: (nodes that need a decision, mask of their symbols among all `count`, true decisions or None) ->
            decisions, 1 for right.
        truth: the symbols, if they are known.
    """
    prefix = np.zeros(count, np.int64)
    for depth in range(depths(alphabet)):
        branching = branching_mask(prefix, depth, alphabet)
        right = np.zeros(count, np.int64)
        if branching.any():
            bits = None if truth is None else (truth[branching] >> (depths(alphabet) - depth - 1)) & 1
            right[branching] = decide((1 << depth) + prefix[branching], branching, bits)
        prefix = 2 * prefix + right
    return prefix
