"""Tables of integers for functions of fixed-point numbers.

They are computed in decimal arithmetic, which is the same everywhere: `decimal` rounds every operation, exp included,
to the nearest decimal of its precision by specification, while binary floats leave exp and erf to the platform's
library.
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
"""Functions are tabulated on [-EDGE, EDGE]."""
STEPS = 256
"""Steps of a table per unit of its argument."""
CURVE_BITS, EXP_BITS = 24, 30
"""Fraction bits of the values: units of 2^-24 for a curve, 2^-30 for the exponential."""
COARSE = 64
"""Steps per unit of the exponential's first table; the second covers one such step in steps of 2^-16."""
LOWEST = 22
"""Largest negated argument of the exponential's table: exp(-22) is less than its last place, 2^-30."""


@lru_cache
def curve(name: str) -> Tensor:
    """Return the values of "gelu", "tanh" or "sigmoid" on [-EDGE, EDGE] in steps of 1 / STEPS, int64."""
    function: Callable[[Decimal], Decimal] = {"gelu": _gelu, "tanh": _tanh, "sigmoid": _sigmoid}[name]
    with localcontext(_PRECISION):
        half = [function(Decimal(i) / STEPS) for i in range(EDGE * STEPS + 1)]
        # The other half follows from the function's symmetry.
        mirrored = {
            "gelu": lambda i, value: value - Decimal(i) / STEPS,
            "tanh": lambda _, value: -value,
            "sigmoid": lambda _, value: 1 - value,
        }[name]
        values = [mirrored(i, half[i]) for i in range(EDGE * STEPS, 0, -1)] + half
        return torch.tensor([_integer(value, CURVE_BITS) for value in values])


@lru_cache
def exponential() -> tuple[Tensor, Tensor]:
    """Return the tables of exp(-i / COARSE) up to LOWEST and of exp(-j / 2^16) up to 1 / COARSE, int64.

    The exponential of a sum is the product of one entry of each.
    """
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
    """Return x Phi(x), by the Taylor series of the normal distribution: sum (-1)^n x^(2n+1) / (n! 2^n (2n+1))."""
    term, total, n = x, x, 0
    while abs(term) > Decimal("1e-30"):
        n += 1
        term = -term * x * x / (2 * n)
        total += term / (2 * n + 1)
    return x * (Decimal(1) / 2 + total / (2 * _PI).sqrt())
