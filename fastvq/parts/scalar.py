"""Scalar quantization: squashing functions, grids of levels, and thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvq.precision import Unsaved, constant


class Rounded(NamedTuple):
    """Result of `Bound.forward`."""

    codes: Tensor  # (..., d) in [-1, 1], dtype of z
    levels: Tensor  # (..., d), integers in [0, L_i)
    error: Tensor | None  # (..., d), squared rounding error, if requested; no gradient


class Bound(Unsaved, nn.Module):
    """Smooth bound on coordinates, followed by rounding to L_i levels.

        relaxed = gain f(z + shift) - lift,   code = the nearest of (2 k - a) / a, k = 0 ... L - 1
        d code / d z = gain f'(z + shift)

    With f = tanh, or clamp to [-1, 1] if hard, or the function of `SYMMETRIC` that `squash` names. Symmetric
    (2411.19842, section 3.2): a = L - 1, gain = 1, shift = lift = 0, so that the levels are symmetric about zero and
    the ends are -1 and 1. Otherwise (2309.15505, equations 1 to 3): a = 2 floor(L / 2), gain = (L - 1) (1 + eps) / a,
    and lift and shift, zero for odd L, keep f's image on the levels and its zero at zero.

    Ties are rounded up. `Thresholds` decides the level, so that it is the same on every device; codes are correctly
    rounded quotients of integers, so that symmetric ones are symmetric to the last bit.
    """

    _constants = ("last", "span", "gain", "shift", "lift")

    last: Tensor
    span: Tensor
    gain: Tensor
    shift: Tensor
    lift: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        *,
        symmetric: bool,
        hard: bool = False,
        eps: float = 1e-3,
        squash: str | None = None,
    ) -> None:
        super().__init__()
        self.levels, self.symmetric, self.hard = tuple(levels), symmetric, hard
        self.squash = squash or ("clamp" if hard else "tanh")
        inverse = SYMMETRIC[self.squash].inverse

        def place(value: float) -> float:
            """Return the least z with f(z) >= value: infinite if there is none, minus infinite if all are."""
            if value <= -1 or value > 1 or (value == 1 and not hard):
                return math.copysign(math.inf, value)
            return inverse(torch.tensor(value, dtype=torch.float64, device="cpu")).item()

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
            setattr(self, name, constant(column, torch.float32))

    def forward(self, z: Tensor, mask: Tensor | None = None, *, with_error: bool = False) -> Rounded:
        """Return codes and levels of z (..., d), float32 or float64; the gradient passes through the codes.

        Where mask (...) is False, codes are zero without gradient, and levels are undefined.
        """
        levels = self.thresholds(z)
        codes = self.values(levels, z.dtype)  # moves the constants to z's device
        if mask is not None:
            codes = torch.where(mask.unsqueeze(-1), codes, 0)
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
            if mask is not None:
                slope = torch.where(mask.unsqueeze(-1), slope, 0)
        return Rounded(with_slope(z, codes, slope), levels, error)

    def values(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the codes (..., d) of levels (..., d)."""
        self.follow_(levels.device)
        span = self.span.to(dtype)
        return levels.to(dtype, copy=True).mul_(2).sub_(span).div_(span)

    def nearest(self, codes: Tensor) -> Tensor:
        """Return the levels (..., d) int64 nearest to codes (..., d), the inverse of `values`; 0 if not finite."""
        self.follow_(codes.device)
        codes = codes if codes.dtype == torch.float64 else codes.float()
        levels = (torch.where(codes.isfinite(), codes, -1) + 1) * self.span / 2
        return levels.round().clamp_min(0).minimum(self.last).long()

    def extra_repr(self) -> str:
        return f"levels={self.levels}, symmetric={self.symmetric}, squash={self.squash}"


class Squash(NamedTuple):
    """Monotone function with its inverse and its derivative.

    `slope(z, value)` is d value / d z, from z and value = apply(z). All three take tensors of any floating dtype.
    """

    apply: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def clamp(z: Tensor) -> Tensor:
    """Return z clamped to [-1, 1]."""
    return z.clamp(-1, 1)


def tanh_act(z: Tensor) -> Tensor:
    """Return (1 + tanh z) / 2."""
    return (torch.tanh(z) + 1) / 2


def tanh_inv_act(p: Tensor) -> Tensor:
    """Invert `tanh_act`."""
    return torch.arctanh(2 * p - 1)


def sigmoid_act(z: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-z)), the logistic distribution."""
    return torch.sigmoid(z)


def sigmoid_inv_act(p: Tensor) -> Tensor:
    """Invert `sigmoid_act`."""
    return torch.logit(p)


def normal_act(z: Tensor) -> Tensor:
    """Return (1 + erf(z / sqrt 2)) / 2."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def normal_inv_act(p: Tensor) -> Tensor:
    """Invert `normal_act`."""
    return math.sqrt(2) * torch.erfinv(2 * p - 1)


def laplace_act(z: Tensor) -> Tensor:
    """Return exp(z) / 2 for z < 0, else 1 - exp(-z) / 2; differentiable at zero too."""
    return torch.where(z < 0, z.clamp_max(0).exp() / 2, 1 - (-z.clamp_min(0)).exp() / 2)


def laplace_inv_act(p: Tensor) -> Tensor:
    """Invert `laplace_act`."""
    return torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log())


def cauchy_act(z: Tensor) -> Tensor:
    """Return 1/2 + arctan(z) / pi."""
    return torch.arctan(z) / math.pi + 0.5


def cauchy_inv_act(p: Tensor) -> Tensor:
    """Invert `cauchy_act`."""
    return torch.tan(math.pi * (p - 0.5))


STEEPNESS = 1.6
"""Factor of z in the sigmoid of iFSQ, with which the image of a standard normal variable is nearly uniform."""


def wide_sigmoid(z: Tensor) -> Tensor:
    """Return 2 / (1 + exp(-1.6 z)) - 1."""
    return torch.tanh(z * (STEEPNESS / 2))


def wide_sigmoid_inverse(value: Tensor) -> Tensor:
    """Invert `wide_sigmoid`."""
    return torch.arctanh(value) / (STEEPNESS / 2)


SYMMETRIC = {
    "tanh": Squash(torch.tanh, torch.arctanh, lambda z, value: 1 - value * value),
    "clamp": Squash(clamp, lambda value: value, lambda z, value: (z.abs() <= 1).to(z.dtype)),
    "sigmoid": Squash(wide_sigmoid, wide_sigmoid_inverse, lambda z, value: (1 - value * value) * (STEEPNESS / 2)),
}
"""Squashing functions to [-1, 1]."""

CUMULATIVE = {
    "tanh": Squash(tanh_act, tanh_inv_act, lambda z, p: 2 * p * (1 - p)),
    "sigmoid": Squash(sigmoid_act, sigmoid_inv_act, lambda z, p: p * (1 - p)),
    "normal": Squash(normal_act, normal_inv_act, lambda z, p: (-z * z / 2).exp() / math.sqrt(2 * math.pi)),
    "laplace": Squash(laplace_act, laplace_inv_act, lambda z, p: (-z.abs()).exp() / 2),
    "cauchy": Squash(cauchy_act, cauchy_inv_act, lambda z, p: 1 / (math.pi * (1 + z * z))),
}
"""Squashing functions to [0, 1]: cumulative distribution functions."""


MOST_COMPARISONS = 32
"""Largest number of thresholds that are compared one by one, which vectorizes; more are bisected."""


class Thresholds(Unsaved, nn.Module):
    """Number of thresholds of its dimension that each coordinate reaches.

        level_i = |{j : z_i >= t_ij}|

    A comparison is exact, so levels depend on the value of z alone, not on the device, the compiler or the
    implementation of tanh. Thresholds are computed in float64; for z in float32 or half precision each is rounded up to
    float32, which gives the same result for every such z.

    Args:
        thresholds: ascending for each dimension; infinite ones are never (or always) reached.
    """

    _constants = ("bounds",)

    bounds: Tensor

    def __init__(self, thresholds: Sequence[Sequence[float]]) -> None:
        super().__init__()
        longest = max(len(row) for row in thresholds)
        exact = np.array([[*row, *[np.inf] * (longest - len(row))] for row in thresholds], dtype=np.float64)
        rounded = exact.astype(np.float32)
        rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
        self.exact = exact.tolist()
        self.bounds = constant(rounded.reshape(len(exact), longest).tolist(), torch.float32).view(len(exact), longest)

    def forward(self, z: Tensor) -> Tensor:
        """Return the levels (..., d) of z (..., d), in int8 if it holds them, else int32; 0 for NaN or more."""
        self.follow_(z.device)
        z, bounds = z.detach(), self.bounds
        if z.dtype == torch.float64:
            bounds = torch.tensor(self.exact, dtype=torch.float64, device=z.device)
        else:
            z = z.to(torch.float32)
        if bounds.shape[1] <= MOST_COMPARISONS:
            levels = torch.zeros_like(z, dtype=torch.int8)
            for threshold in bounds.unbind(1):
                levels += z >= threshold
            return levels
        if torch.compiler.is_exporting():  # ONNX has no bisection
            return (z.unsqueeze(-1) >= bounds).sum(-1, dtype=torch.int32)
        columns = z.reshape(-1, z.shape[-1]).T.contiguous()
        levels = torch.searchsorted(bounds, columns, right=True, out_int32=True)
        return levels.T.reshape(z.shape)


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.to(z.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def with_slope(z: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Return `value` as if it were a function of z with the derivative `slope`; all of one shape.

    It passes gradients straight through a rounding that follows a smooth function, and is exactly `value`, unlike
    f(z) + (value - f(z)).

    Source: Bengio et al. 2013 (straight-through); Mentzer et al. 2023, appendix A.1.
    """
    if not (torch.is_grad_enabled() and z.requires_grad):
        return value.to(z.dtype)  # plain operations, which a trace can save
    return _Sloped.apply(z, value.detach(), slope.detach())
