"""The grid of finite scalar quantization: a squashed coordinate, rounded to the nearest of evenly spaced levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvq.precision import KeepsPrecision

from .squash import SYMMETRIC
from .thresholds import Thresholds, sloped


class Rounded(NamedTuple):
    """What `Bound.forward` returns."""

    codes: Tensor  # (..., d) in [-1, 1], dtype of z
    levels: Tensor  # (..., d), integers in [0, L_i)
    error: Tensor | None  # (..., d), the square of what rounding moved it by, if asked for; no gradient


class Bound(KeepsPrecision, nn.Module):
    """Bounds coordinates smoothly and rounds them to L_i levels each.

        relaxed = gain f(z + shift) - lift,   code = the nearest of (2 k - a) / a, k = 0 ... L - 1
        d code / d z = gain f'(z + shift)

    With f = tanh, or clamp to [-1, 1] if hard. Symmetric (2411.19842, section 3.2): a = L - 1, gain = 1, shift = lift =
    0, so that the levels are symmetric about zero and the ends are -1 and 1. Else (2309.15505, equations 1 to 3): a = 2
    floor(L / 2), gain = (L - 1) (1 + eps) / a, and lift and shift, zero for odd L, keep f's image on the levels and its
    zero at zero.

    Half-way cases go up, to the larger level. Which level it is is decided by `Thresholds`, so that it is the same on
    every device; codes are correctly rounded quotients of integers, so that the symmetric ones are so to the last bit.
    """

    last: Tensor
    span: Tensor
    gain: Tensor
    shift: Tensor
    lift: Tensor

    def __init__(self, levels: Sequence[int], *, symmetric: bool, hard: bool = False, eps: float = 1e-3) -> None:
        super().__init__()
        self.levels, self.symmetric, self.hard = tuple(levels), symmetric, hard
        self.squash = "clamp" if hard else "tanh"
        inverse = SYMMETRIC[self.squash].inverse

        def place(value: float) -> float:
            """The first z that f takes to `value` or beyond, infinite where none is or all are."""
            if value <= -1 or value > 1 or (value == 1 and not hard):
                return math.copysign(math.inf, value)
            return inverse(torch.tensor(value, dtype=torch.float64)).item()

        constants, thresholds = [], []
        for size in self.levels:
            if symmetric:
                span, gain, lift, shift = float(size - 1), 1.0, 0.0, 0.0
            else:
                span, half = 2.0 * (size // 2), (size - 1) * (1 + eps) / 2
                offset = 0.5 if size % 2 == 0 else 0.0
                gain, lift, shift = 2 * half / span, 2 * offset / span, place(offset / half)
            constants.append((size - 1, span, gain, lift, shift))
            thresholds.append([place(((2 * k - 1) / span - 1 + lift) / gain) - shift for k in range(1, size)])
        self.thresholds = Thresholds(thresholds)
        for name, column in zip(("last", "span", "gain", "lift", "shift"), zip(*constants, strict=True), strict=True):
            self.register_buffer(name, torch.tensor(column, dtype=torch.float32), persistent=False)

    def forward(self, z: Tensor, counts: Tensor | None = None, *, with_error: bool = False) -> Rounded:
        """Codes and levels of z (..., d) in float32 or float64; the gradient flows through the codes. Where counts
        (...) is False, codes are zero and pass none, and levels mean nothing."""
        levels = self.thresholds(z)
        codes = self.values(levels, z.dtype)
        if counts is not None:
            codes = torch.where(counts.unsqueeze(-1), codes, 0)
        differentiable = torch.is_grad_enabled() and z.requires_grad
        if not (differentiable or with_error):
            return Rounded(codes, levels, None)
        with torch.no_grad():
            f = SYMMETRIC[self.squash]
            moved = z + self.shift
            bounded = f.apply(moved)
            error = (bounded * self.gain).sub_(self.lift).sub_(codes).square_() if with_error else None
            if not differentiable:
                return Rounded(codes, levels, error)
            slope = f.slope(moved, bounded).mul_(self.gain)
            if counts is not None:
                slope = torch.where(counts.unsqueeze(-1), slope, 0)
        return Rounded(sloped(z, codes, slope), levels, error)

    def values(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The codes (..., d) of levels (..., d)."""
        span = self.span.to(dtype)
        return levels.to(dtype, copy=True).mul_(2).sub_(span).div_(span)

    def nearest(self, codes: Tensor) -> Tensor:
        """The levels (..., d) int64 nearest to codes (..., d), the inverse of `values`; 0 for what isn't finite."""
        codes = codes if codes.dtype == torch.float64 else codes.float()
        levels = (torch.where(codes.isfinite(), codes, -1) + 1) * self.span / 2
        return levels.round().clamp_min(0).minimum(self.last).long()

    def extra_repr(self) -> str:
        return f"levels={self.levels}, symmetric={self.symmetric}, squash={self.squash}"
