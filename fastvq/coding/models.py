"""Probabilities of the decisions, in integers: the same on every machine, whatever it rounds.

A probability is the chance of the right child in units of 2^-16, between 2^-12 and 1 - 2^-12: so a decision costs
at least 1/2839 bit, and a file of a given size can't claim to hold more than so many codes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from . import tree
from .tree import Ints

ONE = 1 << 16
LEAST = 16
LEAST_BITS = 3.5e-4
"""Bits that a decision costs at least, -log2(1 - 2^-12), rounded down."""
_TABLE = 1 << 20
_TRUST = 2  # seen decisions that outweigh what the shorter context says
_FORGET = 1 << 14  # decisions after which a context halves its counts


class Model(Protocol):
    """Predicts decisions at `nodes` from the symbols to the left and above, and learns what they were."""

    def predict(self, nodes: Ints, left: Ints, above: Ints) -> Ints: ...

    def learn(self, nodes: Ints, left: Ints, above: Ints, right: Ints) -> None: ...


def clipped(probabilities: Ints) -> Ints:
    """Kept where both outcomes remain possible."""
    return np.clip(probabilities, LEAST, ONE - LEAST)


class Static:
    """One probability a node, from how often the symbols of the whole file pass it."""

    def __init__(self, passing: Ints, right: Ints) -> None:
        self._table = clipped(right * ONE // np.maximum(passing, 1))

    def predict(self, nodes: Ints, left: Ints, above: Ints) -> Ints:
        return self._table[nodes]

    def learn(self, nodes: Ints, left: Ints, above: Ints, right: Ints) -> None:
        pass


class _Counts:
    """Decisions seen, and how many of them went right, by context."""

    def __init__(self, size: int) -> None:
        self.seen = np.zeros(size, np.int64)
        self.right = np.zeros(size, np.int64)

    def blend(self, slots: Ints, shorter: Ints) -> Ints:
        """The share that went right, with what a shorter context says as `_TRUST` decisions more."""
        return (self.right[slots] * ONE + _TRUST * shorter) // (self.seen[slots] + _TRUST)

    def add(self, slots: Ints, right: Ints) -> None:
        np.add.at(self.seen, slots, 1)
        np.add.at(self.right, slots, right)
        full = slots[self.seen[slots] > _FORGET]
        if len(full):
            full = np.unique(full)
            self.seen[full] >>= 1
            self.right[full] >>= 1


class Adaptive:
    """Learns while it codes. A decision is predicted from what it was at this node, after this symbol to the left,
    below this one above, and after both, each smoothed by the shorter ones.

        p = (right + 2 shorter) / (seen + 2),   shorter(both) = the mean of left's and above's, weighted by seen + 1

    in integer division. Contexts share a table of 2^20 slots, by a multiplicative hash, where they are more.
    Source: hierarchical smoothing as in MacKay and Peto, A hierarchical Dirichlet language model, 1995.
    """

    def __init__(self, alphabet: int) -> None:
        self._nodes = 1 << tree.depths(alphabet)
        self._symbols = alphabet + 1  # and one for "outside"
        self._none = _Counts(self._nodes)
        size = min(_TABLE, self._nodes * self._symbols)
        self._left, self._above = _Counts(size), _Counts(size)
        self._both = _Counts(min(_TABLE, size * self._symbols))

    def _slots(self, table: _Counts, nodes: Ints, context: Ints) -> Ints:
        key = context * self._nodes + nodes
        size = len(table.seen)
        if size < _TABLE:
            return key
        mixed = key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(44)).astype(np.int64)  # the highest 20 bits

    def _all_slots(self, nodes: Ints, left: Ints, above: Ints) -> tuple[Ints, Ints, Ints]:
        return (
            self._slots(self._left, nodes, left),
            self._slots(self._above, nodes, above),
            self._slots(self._both, nodes, left * self._symbols + above),
        )

    def predict(self, nodes: Ints, left: Ints, above: Ints) -> Ints:
        by_left, by_above, by_both = self._all_slots(nodes, left, above)
        shortest = (2 * self._none.right[nodes] + 1) * ONE // (2 * self._none.seen[nodes] + 2)
        after_left = self._left.blend(by_left, shortest)
        below_above = self._above.blend(by_above, shortest)
        left_weight, above_weight = self._left.seen[by_left] + 1, self._above.seen[by_above] + 1
        mean = (after_left * left_weight + below_above * above_weight) // (left_weight + above_weight)
        return clipped(self._both.blend(by_both, mean))

    def learn(self, nodes: Ints, left: Ints, above: Ints, right: Ints) -> None:
        by_left, by_above, by_both = self._all_slots(nodes, left, above)
        self._none.add(nodes, right)
        self._left.add(by_left, right)
        self._above.add(by_above, right)
        self._both.add(by_both, right)
