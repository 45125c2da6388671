"""Range coding of decisions by the library `constriction`."""

from __future__ import annotations

import math
from typing import Any, Protocol

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
"""Bits of a digit, the largest number that the coder takes at once."""


def _places(limit: int) -> list[tuple[int, int]]:
    """Return (shift, largest digit) for the digits of a number up to limit, the highest first."""
    shifts = range(max(0, limit.bit_length() - 1) // _DIGIT * _DIGIT, -1, -_DIGIT)
    places = [(shift, limit >> shift if i == 0 else (1 << _DIGIT) - 1) for i, shift in enumerate(shifts)]
    return [place for place in places if place[1]]


def _digits(value: int, limit: int) -> list[tuple[int, int]]:
    return [(value >> shift & ((1 << _DIGIT) - 1), largest) for shift, largest in _places(limit)]


class Coder(Protocol):
    """Coder of decisions, given the probabilities of 1 (right) in the units of `models`.

    An encoder writes the `truth` and returns it; a decoder ignores `truth` and returns the decisions that it reads.
    """

    def decide(self, probabilities: Ints, truth: Ints | None) -> Ints: ...

    def decide_one(self, probability: int, truth: int | None) -> int: ...


class SymbolEncoder:
    """Range encoder; `bits` is the ideal length of everything encoded so far."""

    def __init__(self) -> None:
        stream = _constriction().stream
        self._encoder = stream.queue.RangeEncoder()
        self._decision = stream.model.Bernoulli(perfect=False)
        self._uniform = stream.model.Uniform()
        self._one = stream.model.Bernoulli
        self.bits = 0.0

    def decide(self, probabilities: Ints, truth: Ints | None) -> Ints:
        assert truth is not None
        chances = probabilities / ONE
        self.bits -= float(np.log2(np.where(truth == 1, chances, 1 - chances)).sum())
        self._encoder.encode(truth.astype(np.int32), self._decision, chances)
        return truth

    def decide_one(self, probability: int, truth: int | None) -> int:
        assert truth is not None
        chance = probability / ONE
        self.bits -= math.log2(chance if truth else 1 - chance)
        self._encoder.encode(truth, self._one(chance, perfect=False))
        return truth

    def number(self, value: int, limit: int) -> None:
        """Encode a number in [0, limit] under a uniform distribution."""
        for digit, largest in _digits(value, limit):
            self.bits += float(np.log2(largest + 1))
            self._encoder.encode(np.array([digit], np.int32), self._uniform, np.array([largest + 1], np.int32))

    def words(self) -> bytes:
        """Return the encoded 32-bit words, little-endian."""
        return self._encoder.get_compressed().astype("<u4").tobytes()


class SymbolDecoder:
    """Range decoder."""

    def __init__(self, words: bytes) -> None:
        stream = _constriction().stream
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        self._decision = stream.model.Bernoulli(perfect=False)
        self._uniform = stream.model.Uniform()
        self._one = stream.model.Bernoulli

    def decide(self, probabilities: Ints, truth: Ints | None = None) -> Ints:
        right: NDArray[np.int32] = self._decoder.decode(self._decision, probabilities / ONE)
        return right.astype(np.int64)

    def decide_one(self, probability: int, truth: int | None = None) -> int:
        return int(self._decoder.decode(self._one(probability / ONE, perfect=False)))

    def number(self, limit: int) -> int:
        """Decode a number in [0, limit]."""
        value = 0
        for shift, largest in _places(limit):
            digit = self._decoder.decode(self._uniform, np.array([largest + 1], np.int32))[0]
            value += int(digit) << shift
        if value > limit:
            raise ValueError(f"a number must be at most {limit}, got {value}")
        return value
