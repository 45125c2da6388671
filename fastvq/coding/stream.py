"""Decisions through the range coder of the library `constriction`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvq.extras import require

from .models import ONE
from .tree import Ints


def _constriction() -> Any:
    require("constriction", extra="coding")
    import constriction

    return constriction


_DIGIT = 20
"""Bits of the numbers that the coder takes at once."""


def _places(limit: int) -> list[tuple[int, int]]:
    """(shift, largest digit) of a number up to limit, the highest digit first."""
    shifts = range(max(0, limit.bit_length() - 1) // _DIGIT * _DIGIT, -1, -_DIGIT)
    places = [(shift, limit >> shift if i == 0 else (1 << _DIGIT) - 1) for i, shift in enumerate(shifts)]
    return [place for place in places if place[1]]


def _digits(value: int, limit: int) -> list[tuple[int, int]]:
    return [(value >> shift & ((1 << _DIGIT) - 1), largest) for shift, largest in _places(limit)]


class Encoder:
    """Takes decisions with their probabilities; `bits` is their ideal length so far."""

    def __init__(self) -> None:
        stream = _constriction().stream
        self._encoder = stream.queue.RangeEncoder()
        self._decision = stream.model.Bernoulli(perfect=False)
        self._uniform = stream.model.Uniform()
        self.bits = 0.0

    def decide(self, right: Ints, probabilities: Ints) -> None:
        chances = probabilities / ONE
        self.bits -= float(np.log2(np.where(right == 1, chances, 1 - chances)).sum())
        self._encoder.encode(right.astype(np.int32), self._decision, chances)

    def number(self, value: int, limit: int) -> None:
        """One of 0 ... limit, all alike."""
        for digit, largest in _digits(value, limit):
            self.bits += float(np.log2(largest + 1))
            self._encoder.encode(np.array([digit], np.int32), self._uniform, np.array([largest + 1], np.int32))

    def words(self) -> bytes:
        return self._encoder.get_compressed().astype("<u4").tobytes()


class Decoder:
    def __init__(self, words: bytes) -> None:
        stream = _constriction().stream
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        self._decision = stream.model.Bernoulli(perfect=False)
        self._uniform = stream.model.Uniform()

    def decide(self, probabilities: Ints) -> Ints:
        right: NDArray[np.int32] = self._decoder.decode(self._decision, probabilities / ONE)
        return right.astype(np.int64)

    def number(self, limit: int) -> int:
        value = 0
        for shift, largest in _places(limit):
            digit = self._decoder.decode(self._uniform, np.array([largest + 1], np.int32))[0]
            value += int(digit) << shift
        if value > limit:
            raise ValueError(f"{value} where at most {limit} can be")
        return value
