"""Integer probabilities of the decisions, which are the same on every machine.

A probability is that of the right child in units of 2^-16, between 2^-12 and 1 - 2^-12. A decision therefore costs at
least 1/2839 bit, which bounds the number of decisions that a file of a given size can claim to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from . import tree
from .tree import Ints

ONE = 1 << 16
LEAST = 16
LEAST_BITS = 3.5e-4
"""Lower bound on the bits of a decision: -log2(1 - 2^-12), rounded down."""
_TABLE = 1 << 20
_HASH = 0x9E3779B97F4A7C15
_TRUST = 2  # weight of the shorter context's prediction, in decisions
_FORGET = 1 << 14  # decisions after which a context halves its counts


Context = tuple[int, int, int]
"""A node, the symbol to the left and the symbol above."""


class Model(Protocol):
    """Predictor of decisions at nodes, given the symbols to the left and above.

    `predict` and `learn` take arrays; `predict_one` and `learn_few` take Python integers, which are faster for a few.
    """

    def predict(self, nodes: Ints, left: Ints, above: Ints) -> Ints: ...

    def learn(self, nodes: Ints, left: Ints, above: Ints, right: Ints) -> None: ...

    def predict_one(self, node: int, left: int, above: int) -> int: ...

    def learn_few(self, contexts: Sequence[Context], rights: Sequence[int]) -> None: ...


def clipped(probabilities: Ints) -> Ints:
    """Return probabilities limited so that both outcomes remain possible."""
    return np.clip(probabilities, LEAST, ONE - LEAST)


class Static:
    """Model with one probability per node, from the frequencies of the whole file."""

    def __init__(self, passing: Ints, right: Ints) -> None:
        self._table = clipped(right * ONE // np.maximum(passing, 1))
        self._view = self._table.data

    def predict(self, nodes: Ints, left: Ints, above: Ints) -> Ints:
        return self._table[nodes]

    def learn(self, nodes: Ints, left: Ints, above: Ints, right: Ints) -> None:
        pass

    def predict_one(self, node: int, left: int, above: int) -> int:
        return self._view[node]

    def learn_few(self, contexts: Sequence[Context], rights: Sequence[int]) -> None:
        pass


class _Counts:
    """Numbers of decisions and right turns by context slot. Single accesses go through the views, which are faster."""

    def __init__(self, size: int) -> None:
        self.seen = np.zeros(size, np.int64)
        self.right = np.zeros(size, np.int64)
        self.seen_view, self.right_view = self.seen.data, self.right.data

    def add(self, slots: Ints, right: Ints) -> None:
        np.add.at(self.seen, slots, 1)
        np.add.at(self.right, slots, right)
        full = slots[self.seen[slots] > _FORGET]
        if len(full):
            full = np.unique(full)
            self.seen[full] >>= 1
            self.right[full] >>= 1

    def add_few(self, slots: Sequence[int], rights: Sequence[int]) -> None:
        all_seen, all_right = self.seen_view, self.right_view
        for slot, right in zip(slots, rights, strict=True):
            all_seen[slot] += 1
            all_right[slot] += right
        for slot in set(slots):  # after all additions, as in `add`
            if all_seen[slot] > _FORGET:
                all_seen[slot] >>= 1
                all_right[slot] >>= 1


Number = TypeVar("Number", int, Ints)
Cell = tuple[Number, Number]
"""Decisions that a context has seen, and right turns among them."""


def _blend(cell: Cell[Number], shorter: Number) -> Number:
    """Return the share of right turns, smoothed by the shorter context's prediction as `_TRUST` more decisions."""
    seen, right = cell
    return (right * ONE + _TRUST * shorter) // (seen + _TRUST)


def _blended(none: Cell[Number], left: Cell[Number], above: Cell[Number], both: Cell[Number]) -> Number:
    shortest = (2 * none[1] + 1) * ONE // (2 * none[0] + 2)
    left_weight, above_weight = left[0] + 1, above[0] + 1
    after_left, below_above = _blend(left, shortest), _blend(above, shortest)
    mean = (after_left * left_weight + below_above * above_weight) // (left_weight + above_weight)
    return _blend(both, mean)


class Adaptive:
    """Model that learns while it codes.

    A decision is predicted from earlier ones at the same node: after the same symbol to the left, below the same symbol
    above, and with both, each smoothed by the shorter context.

        p = (right + 2 shorter) / (seen + 2),   shorter(both) = the mean of left's and above's, weighted by seen + 1

    in integer division. Contexts share a table of 2^20 slots, by a multiplicative hash, if there are more of them.

    Source: hierarchical smoothing as in MacKay and Peto, A hierarchical Dirichlet language model, 1995.
    """

    def __init__(self, alphabet: int, nodes: int | None = None) -> None:
        self._nodes = 1 << tree.depths(alphabet) if nodes is None else nodes
        self._symbols = alphabet + 1  # the last one stands for "outside the grid"
        self._none = _Counts(self._nodes)
        size = min(_TABLE, self._nodes * self._symbols)
        self._left, self._above = _Counts(size), _Counts(size)
        self._both = _Counts(min(_TABLE, size * self._symbols))
        self._counts = (self._none, self._left, self._above, self._both)

    def _slots(self, table: _Counts, nodes: Number, context: Number) -> Number:
        key = context * self._nodes + nodes
        if len(table.seen) < _TABLE:
            return key
        if isinstance(key, int):
            return (key * _HASH & (1 << 64) - 1) >> 44
        mixed = key.astype(np.uint64) * np.uint64(_HASH)
        return (mixed >> np.uint64(44)).astype(np.int64)  # the highest 20 bits

    def _all_slots(self, nodes: Number, left: Number, above: Number) -> tuple[Number, Number, Number]:
        return (
            self._slots(self._left, nodes, left),
            self._slots(self._above, nodes, above),
            self._slots(self._both, nodes, left * self._symbols + above),
        )

    def predict(self, nodes: Ints, left: Ints, above: Ints) -> Ints:
        slots = (nodes, *self._all_slots(nodes, left, above))
        cells = [(counts.seen[at], counts.right[at]) for counts, at in zip(self._counts, slots, strict=True)]
        return clipped(_blended(*cells))

    def learn(self, nodes: Ints, left: Ints, above: Ints, right: Ints) -> None:
        for counts, at in zip(self._counts, (nodes, *self._all_slots(nodes, left, above)), strict=True):
            counts.add(at, right)

    def predict_one(self, node: int, left: int, above: int) -> int:
        slots = (node, *self._all_slots(node, left, above))
        cells = [(counts.seen_view[at], counts.right_view[at]) for counts, at in zip(self._counts, slots, strict=True)]
        return min(max(_blended(*cells), LEAST), ONE - LEAST)

    def learn_few(self, contexts: Sequence[Context], rights: Sequence[int]) -> None:
        slots = zip(*((context[0], *self._all_slots(*context)) for context in contexts), strict=True)
        for counts, at in zip(self._counts, slots, strict=True):
            counts.add_few(at, rights)
