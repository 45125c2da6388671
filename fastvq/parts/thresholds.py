"""Scalar quantization by comparison: which interval of the real line each coordinate lies in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvq.precision import KeepsPrecision

COMPARED = 32
"""Up to so many thresholds a coordinate is compared with each of them, which vectorises; beyond, bisected."""


class Thresholds(KeepsPrecision, nn.Module):
    """Counts, for each coordinate, the thresholds of its dimension that it reaches.

        level_i = |{j : z_i >= t_ij}|

    A comparison is exact, so that levels depend on nothing but the value of z: not on the device, the compiler or how
    it computes tanh. Thresholds are computed in float64; for z in float32 or half precision each is the smallest
    float32 that isn't below it, which decides alike for every such z.

    Args:
        thresholds: for each dimension, ascending; infinities are never reached (or always).
    """

    bounds: Tensor

    def __init__(self, thresholds: Sequence[Sequence[float]]) -> None:
        super().__init__()
        longest = max(len(row) for row in thresholds)
        exact = np.array([[*row, *[np.inf] * (longest - len(row))] for row in thresholds], dtype=np.float64)
        rounded = exact.astype(np.float32)
        rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
        self.exact = exact.tolist()
        self.register_buffer("bounds", torch.from_numpy(rounded.reshape(len(exact), longest)), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Levels (..., d) of z (..., d), int8 where that holds them, else int32; 0 for NaN or more."""
        z, bounds = z.detach(), self.bounds
        if z.dtype == torch.float64:
            bounds = torch.tensor(self.exact, dtype=torch.float64, device=z.device)
        else:
            z = z.to(torch.float32)
        if bounds.shape[1] <= COMPARED:
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


def sloped(z: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value`, as if it were a function of z with the derivative `slope`: straight through a rounding that follows a
    smooth function, and exactly `value`, unlike f(z) + (value - f(z)). All of one shape.

    Source: Bengio et al. 2013 (straight-through); Mentzer et al. 2023, appendix A.1.
    """
    if not (torch.is_grad_enabled() and z.requires_grad):
        return value.to(z.dtype)  # plain operations, which a trace can save
    return _Sloped.apply(z, value.detach(), slope.detach())
