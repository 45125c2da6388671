"""Fixed-point arithmetic for priors: every result is the same integer on every machine.

A number is an integer in units of 2^-16, held in a float64. Sums and products of integers are exact in float64 as long
as they stay below 2^53, in whatever order they are added, with or without fused operations: so a matrix product has one
possible result, by any library, number of threads or device. Operands are clamped so that the bound holds, quotients
and roots are corrected to the exact floor, and curves come from tables of integers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastvq.errors import CodingError

from . import tables

FRACTION = 16
ONE = 1 << FRACTION
_EXACT = float(1 << 52)
"""Sums stay below this: half of what float64 holds exactly, so that rounding to the nearest unit is exact as well."""
_WIDE = float(1 << 24)
"""Operands of linear layers and norms lie within +-2^24 units, 256."""
_NARROW = float(1 << 22)
"""Queries, keys and values lie within +-2^22 units, 64."""
_DIM_LIMIT, _HEAD_LIMIT, _PLACES_LIMIT = 1 << 12, 1 << 8, 1 << 13


class Fixed:
    """The operations of a prior's step in fixed point (`fastvq.models.priors.arithmetic.Arithmetic`), on the CPU.

    Against the float model an activation is off by some 2^-16, and one beyond +-256 (a query, key or value beyond +-64)
    is clamped: what a code costs hardly changes, and never what is decoded.

    Raises:
        CodingError: weights that aren't finite or so large that sums might not be exact; layers too wide.
    """

    def __init__(self) -> None:
        # By identity of the parameter, which is kept alive beside what became of it.
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}
        self._matrices: dict[int, tuple[Tensor, Tensor]] = {}

    def constant(self, parameter: Tensor) -> Tensor:
        """Rounded to the nearest unit."""
        known = self._constants.get(id(parameter))
        if known is None:
            units = (parameter.detach().cpu().double() * ONE).round()
            if not bool((units.abs() <= ONE * ONE).all()):
                raise CodingError("prior: weights that aren't finite, or beyond 65536, can't be coded with")
            known = self._constants[id(parameter)] = (parameter, units)
        return known[1]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        known = self._matrices.get(id(weight))
        if known is None:
            units = self.constant(weight)
            if float(units.abs().sum(1).max()) * _WIDE > _EXACT:
                raise CodingError("prior: weights of a layer that add up to more than 4096 can't be coded with")
            known = self._matrices[id(weight)] = (weight, units.T.contiguous())
        product = _shifted(x.clamp(-_WIDE, _WIDE) @ known[1], FRACTION)
        return product if bias is None else product + self.constant(bias)

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        """(x - mean) / sqrt(variance + eps), times the weight, plus the bias."""
        size = x.shape[-1]
        if size > _DIM_LIMIT:
            raise CodingError(f"prior: a width of {size}; coding takes up to {_DIM_LIMIT}")
        x = x.clamp(-_WIDE, _WIDE)
        centred = x - _floor_divided(x.sum(-1, keepdim=True), torch.tensor(float(size), dtype=x.dtype))
        # Squares are beyond float64's integers, but not beyond int64's: 2^50 each, 2^62 together.
        squares = centred.long().square().sum(-1, keepdim=True) + size * round(layer.eps * (1 << 2 * FRACTION))
        root = math.isqrt(size << 2 * FRACTION)
        scaled = _floor_divided(centred * root, _root(squares).double())
        scaled = _shifted(scaled * self.constant(layer.weight), FRACTION)
        return scaled if layer.bias is None else scaled + self.constant(layer.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, places = k.shape[-1], k.shape[-2]
        if size > _HEAD_LIMIT or places > _PLACES_LIMIT:
            raise CodingError(
                f"prior: {places} places and heads of {size}; coding takes up to {_PLACES_LIMIT} and {_HEAD_LIMIT}"
            )
        scores = _shifted(q.clamp(-_NARROW, _NARROW) @ k.clamp(-_NARROW, _NARROW).mT, FRACTION)
        scores = _shifted(scores * math.isqrt((1 << 2 * FRACTION) // size), FRACTION)
        weights = (exponentials(scores) >> tables.EXP_BITS - FRACTION).double()
        total = weights.sum(-1, keepdim=True)
        return _floor_divided(weights @ v.clamp(-_NARROW, _NARROW), total)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return _shifted(x.clamp(-_WIDE, _WIDE) * y.clamp(-_WIDE, _WIDE), FRACTION)

    def gelu(self, x: Tensor) -> Tensor:
        return _curve("gelu", x) + (x - tables.EDGE * ONE).clamp_min(0)

    def tanh(self, x: Tensor) -> Tensor:
        return _curve("tanh", x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return _curve("sigmoid", x)


def exponentials(x: Tensor) -> Tensor:
    """exp(x - max x) along the last axis, int64 in units of 2^-30, for x in units of 2^-16."""
    coarse, fine = tables.exponential()
    step = ONE // tables.COARSE
    below = (x.amax(-1, keepdim=True) - x).clamp_max(tables.LOWEST * ONE).long()
    return coarse[below // step] * fine[below % step] >> tables.EXP_BITS


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x / 2^bits, rounded to the nearest integer; exact for |x| up to 2^52."""
    return torch.floor(x * 2.0**-bits + 0.5)


def _floor_divided(x: Tensor, by: Tensor) -> Tensor:
    """floor(x / by) of integers, by > 0: the quotient's rounding may be off by one, and the remainder says so."""
    quotient = torch.floor(x / by)
    rest = x - quotient * by
    return quotient + (rest >= by).double() - (rest < 0).double()


def _root(x: Tensor) -> Tensor:
    """floor(sqrt(x)) of int64 up to 2^62."""
    root = x.double().sqrt().long()
    root = root - (root * root > x).long()
    return root + ((root + 1) * (root + 1) <= x).long()


def _curve(name: str, x: Tensor) -> Tensor:
    """Between two entries of the table, a line."""
    table = tables.curve(name)
    step = ONE // tables.STEPS
    at = (x.clamp(-tables.EDGE * ONE, tables.EDGE * ONE) + tables.EDGE * ONE).long()
    index = (at // step).clamp_max(len(table) - 2)
    part = at - index * step
    value = table[index] * (step - part) + table[index + 1] * part
    # Units of 2^-24, times the step of 2^8.
    bits = tables.CURVE_BITS - FRACTION + step.bit_length() - 1
    return ((value + (1 << bits - 1)) >> bits).double()
