"""Functions of fixed-point numbers as tables of integers, from decimal arithmetic, which is the same everywhere.

`decimal` rounds every operation, exp included, to the nearest decimal of its precision by specification; binary floats
leave exp and erf to the machine's library.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from functools import lru_cache

import torch
from torch import Tensor

_PRECISION = Context(prec=60)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
EDGE = 8
"""Curves are tabled on [-EDGE, EDGE]."""
STEPS = 256
"""Steps of a curve's table for each unit of its argument."""
CURVE_BITS, EXP_BITS = 24, 30
"""Units of the values: 2^-24 of a curve, 2^-30 of the exponential."""
COARSE = 64
"""Steps for each unit of the argument of the exponential's first table; the second has 2^-16, up to such a step."""
LOWEST = 22
"""exp(-22) is less than 2^-30, the last place of its table."""


@lru_cache
def curve(name: str) -> Tensor:
    """(2 EDGE STEPS + 1,) int64: "gelu", "tanh" or "sigmoid" at -EDGE, -EDGE + 1 / STEPS, ... EDGE."""
    function: Callable[[Decimal], Decimal] = {"gelu": _gelu, "tanh": _tanh, "sigmoid": _sigmoid}[name]
    with localcontext(_PRECISION):
        half = [function(Decimal(i) / STEPS) for i in range(EDGE * STEPS + 1)]
        # The other half follows from the symmetry of each.
        mirrored = {
            "gelu": lambda i, value: value - Decimal(i) / STEPS,
            "tanh": lambda _, value: -value,
            "sigmoid": lambda _, value: 1 - value,
        }[name]
        values = [mirrored(i, half[i]) for i in range(EDGE * STEPS, 0, -1)] + half
        return torch.tensor([_integer(value, CURVE_BITS) for value in values])


@lru_cache
def exponential() -> tuple[Tensor, Tensor]:
    """exp(-i / COARSE) up to LOWEST, and exp(-j / 2^16) up to 1 / COARSE; exp of a sum is the product. int64."""
    with localcontext(_PRECISION):
        coarse = [(-Decimal(i) / COARSE).exp() for i in range(LOWEST * COARSE + 1)]
        fine = [(-Decimal(j) / (1 << 16)).exp() for j in range((1 << 16) // COARSE)]
        return torch.tensor([_integer(v, EXP_BITS) for v in coarse]), torch.tensor(
            [_integer(v, EXP_BITS) for v in fine]
        )


def _integer(value: Decimal, bits: int) -> int:
    return int((value * (1 << bits)).to_integral_value())


def _sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def _tanh(x: Decimal) -> Decimal:
    return 2 * _sigmoid(2 * x) - 1


def _gelu(x: Decimal) -> Decimal:
    """x Phi(x), from the Taylor series of the normal distribution function: sum (-1)^n x^(2n+1) / (n! 2^n (2n+1))."""
    term, total, n = x, x, 0
    while abs(term) > Decimal("1e-30"):
        n += 1
        term = -term * x * x / (2 * n)
        total += term / (2 * n + 1)
    return x * (Decimal(1) / 2 + total / (2 * _PI).sqrt())
