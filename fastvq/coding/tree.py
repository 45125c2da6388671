"""Symbols as binary decisions: each is the path to a leaf of a binary tree, from the highest bit down.

A node is named by its depth and the bits so far, node = 2^depth + prefix, so the nodes are 1 ... 2^depths - 1. Where
the alphabet isn't a power of two, some right children hold no symbol: there is nothing to decide there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Open = NDArray[np.bool_]


def depths(alphabet: int) -> int:
    """How many decisions a symbol takes at most."""
    return (alphabet - 1).bit_length()


def decided(prefix: Ints, depth: int, alphabet: int) -> Open:
    """Whether both children of the nodes at `depth` that `prefix` leads to hold symbols."""
    below = depths(alphabet) - depth - 1
    return ((2 * prefix + 1) << below) < alphabet


def node_counts(symbols: Ints, alphabet: int) -> tuple[Ints, Ints]:
    """How many of the symbols pass each node, and how many of them to the right; both (2^depths,)."""
    leaves = 1 << depths(alphabet)
    passing = np.zeros(2 * leaves, np.int64)
    passing[leaves:] = np.bincount(symbols, minlength=leaves)
    for depth in range(depths(alphabet) - 1, -1, -1):
        level = slice(1 << depth, 2 << depth)
        passing[level] = passing[2 << depth : 4 << depth].reshape(-1, 2).sum(1)
    right = np.zeros(leaves, np.int64)
    right[1:] = passing[3::2]
    return passing[:leaves], right


def for_passed(passing: Ints, right: Ints, alphabet: int, number: Callable[[int, int], int]) -> None:
    """From the root down, right[node] = number(right[node], passing[node]) wherever something passes and there is
    something to decide; what passes the children follows."""
    for depth in range(depths(alphabet)):
        start = 1 << depth
        prefixes = np.flatnonzero(passing[start : 2 * start])
        for prefix, is_open in zip(prefixes.tolist(), decided(prefixes, depth, alphabet).tolist(), strict=True):
            node = start + prefix
            right[node] = number(int(right[node]), int(passing[node])) if is_open else 0
            if 2 * node < len(passing):
                passing[2 * node : 2 * node + 2] = passing[node] - right[node], right[node]


def walk_few(
    count: int,
    alphabet: int,
    decide: Callable[[list[int], list[int], list[int] | None], list[int]],
    truth: list[int] | None = None,
) -> list[int]:
    """`walk` in lists of Python's integers; `decide` is given which symbols these are as a list of places."""
    prefixes = [0] * count
    for below in range(depths(alphabet) - 1, -1, -1):
        open_ = [place for place, prefix in enumerate(prefixes) if (2 * prefix + 1) << below < alphabet]
        prefixes = [2 * prefix for prefix in prefixes]
        if open_:
            nodes = [(1 << depths(alphabet) - below - 1) + prefixes[place] // 2 for place in open_]
            bits = None if truth is None else [truth[place] >> below & 1 for place in open_]
            for place, right in zip(open_, decide(nodes, open_, bits), strict=True):
                prefixes[place] += right
    return prefixes


def walk(
    count: int, alphabet: int, decide: Callable[[Ints, Open, Ints | None], Ints], truth: Ints | None = None
) -> Ints:
    """The symbols (count,) that decisions lead to, those of all symbols at a depth at once.

    Args:
        decide: from the nodes of symbols at which there is something to decide, which of the `count` symbols these
            are, and what is true of them if that is known, to what is decided: 1 for right.
        truth: the symbols, where they are known.
    """
    prefix = np.zeros(count, np.int64)
    for depth in range(depths(alphabet)):
        open_ = decided(prefix, depth, alphabet)
        right = np.zeros(count, np.int64)
        if open_.any():
            bits = None if truth is None else (truth[open_] >> (depths(alphabet) - depth - 1)) & 1
            right[open_] = decide((1 << depth) + prefix[open_], open_, bits)
        prefix = 2 * prefix + right
    return prefix
