"""Fixed-point arithmetic for priors: every result is the same integer on every machine.

A number is an integer in units of 2^-16, held in a float64. Sums and products of integers below 2^53 are exact in
float64, in any order and with or without fused operations, so a matrix product has one possible result for every
library, number of threads and device. Operands are clamped to keep the bound, quotients and roots are corrected to the
exact floor, and nonlinear functions come from tables of integers.
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
"""Bound on sums: half of the exact range of float64, so that rounding to the nearest unit is exact as well."""
_WIDE = float(1 << 24)
"""Bound on the operands of linear layers and norms: 2^24 units, 256."""
_NARROW = float(1 << 22)
"""Bound on queries, keys and values: 2^22 units, 64."""
_DIM_LIMIT, _HEAD_LIMIT, _PLACES_LIMIT = 1 << 12, 1 << 8, 1 << 13


class Fixed:
    """The operations of a prior's step in fixed point (`fastvq.models.priors.arithmetic.Arithmetic`), on the CPU.

    An activation differs from the float model's by about 2^-16, and is clamped beyond +-256 (a query, key or value
    beyond +-64). This slightly changes the size of a file, never the decoded indices.

    Raises:
        CodingError: weights that are not finite or so large that sums might not be exact; layers too wide.
    """

    def __init__(self) -> None:
        # Keyed by the id of the parameter, which is stored beside the result to keep it alive.
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}
        self._matrices: dict[int, tuple[Tensor, Tensor]] = {}

    def constant(self, parameter: Tensor) -> Tensor:
        """Return a parameter rounded to the nearest unit."""
        known = self._constants.get(id(parameter))
        if known is None:
            units = (parameter.detach().cpu().double() * ONE).round()
            if not bool((units.abs() <= ONE * ONE).all()):
                raise CodingError("prior: its weights must be finite and within 65536 for coding")
            known = self._constants[id(parameter)] = (parameter, units)
        return known[1]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        known = self._matrices.get(id(weight))
        if known is None:
            units = self.constant(weight)
            if float(units.abs().sum(1).max()) * _WIDE > _EXACT:
                raise CodingError("prior: the weights of a layer's output must add up to at most 4096 for coding")
            known = self._matrices[id(weight)] = (weight, units.T.contiguous())
        product = _shift_rounded(x.clamp(-_WIDE, _WIDE) @ known[1], FRACTION)
        return product if bias is None else product + self.constant(bias)

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        """Return (x - mean) / sqrt(variance + eps), times the weight, plus the bias."""
        size = x.shape[-1]
        if size > _DIM_LIMIT:
            raise CodingError(f"prior: coding supports widths up to {_DIM_LIMIT}, got {size}")
        x = x.clamp(-_WIDE, _WIDE)
        centered = x - _floor_divide(x.sum(-1, keepdim=True), torch.tensor(float(size), dtype=x.dtype))
        # Squares exceed the exact integers of float64 but fit int64: 2^50 each, 2^62 in total.
        squares = centered.long().square().sum(-1, keepdim=True) + size * round(layer.eps * (1 << 2 * FRACTION))
        root = math.isqrt(size << 2 * FRACTION)
        scaled = _floor_divide(centered * root, _floor_sqrt(squares).double())
        scaled = _shift_rounded(scaled * self.constant(layer.weight), FRACTION)
        return scaled if layer.bias is None else scaled + self.constant(layer.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, places = k.shape[-1], k.shape[-2]
        if size > _HEAD_LIMIT or places > _PLACES_LIMIT:
            raise CodingError(
                f"prior: coding takes up to {_PLACES_LIMIT} places and heads of {_HEAD_LIMIT}, got {places} and {size}"
            )
        scores = _shift_rounded(q.clamp(-_NARROW, _NARROW) @ k.clamp(-_NARROW, _NARROW).mT, FRACTION)
        scores = _shift_rounded(scores * math.isqrt((1 << 2 * FRACTION) // size), FRACTION)
        weights = (exponentials(scores) >> tables.EXP_BITS - FRACTION).double()
        total = weights.sum(-1, keepdim=True)
        return _floor_divide(weights @ v.clamp(-_NARROW, _NARROW), total)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return _shift_rounded(x.clamp(-_WIDE, _WIDE) * y.clamp(-_WIDE, _WIDE), FRACTION)

    def gelu(self, x: Tensor) -> Tensor:
        return _interpolate("gelu", x) + (x - tables.EDGE * ONE).clamp_min(0)

    def tanh(self, x: Tensor) -> Tensor:
        return _interpolate("tanh", x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return _interpolate("sigmoid", x)


def exponentials(x: Tensor) -> Tensor:
    """Return exp(x - max x) along the last axis, int64 in units of 2^-30, for x in units of 2^-16."""
    coarse, fine = tables.exponential()
    step = ONE // tables.COARSE
    below = (x.amax(-1, keepdim=True) - x).clamp_max(tables.LOWEST * ONE).long()
    return coarse[below // step] * fine[below % step] >> tables.EXP_BITS


def _shift_rounded(x: Tensor, bits: int) -> Tensor:
    """Return x / 2^bits, rounded to the nearest integer; exact for |x| up to 2^52."""
    return torch.floor(x * 2.0**-bits + 0.5)


def _floor_divide(x: Tensor, by: Tensor) -> Tensor:
    """Return floor(x / by) of integers, by > 0.

    The rounded quotient may be off by one, which the sign or size of the remainder reveals.
    """
    quotient = torch.floor(x / by)
    rest = x - quotient * by
    return quotient + (rest >= by).double() - (rest < 0).double()


def _floor_sqrt(x: Tensor) -> Tensor:
    """Return floor(sqrt(x)) of int64 up to 2^62."""
    root = x.double().sqrt().long()
    root = root - (root * root > x).long()
    return root + ((root + 1) * (root + 1) <= x).long()


def _interpolate(name: str, x: Tensor) -> Tensor:
    """Return a tabulated function of x, interpolated linearly between the entries of its table."""
    table = tables.curve(name)
    step = ONE // tables.STEPS
    at = (x.clamp(-tables.EDGE * ONE, tables.EDGE * ONE) + tables.EDGE * ONE).long()
    index = (at // step).clamp_max(len(table) - 2)
    part = at - index * step
    value = table[index] * (step - part) + table[index + 1] * part
    # The value is in units of 2^-24, times the step of 2^8.
    bits = tables.CURVE_BITS - FRACTION + step.bit_length() - 1
    return ((value + (1 << bits - 1)) >> bits).double()
