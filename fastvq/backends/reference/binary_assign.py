"""The op `binary_assign` by definition: the softmax over all vectors of signs, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import chunk_rows, compute_dtype, row_mask, widen

from .soft_assign import entropy_slope, entropy_terms


def _signs(dim: int, device: torch.device) -> Tensor:
    """Return all vectors of -1 and 1 (2^D, D); dimension 0 is the most significant bit of the index."""
    codes = torch.arange(1 << dim, device=device)
    bits = codes[:, None] >> torch.arange(dim - 1, -1, -1, device=device) & 1
    return (2 * bits - 1).double()


def binary_assign_forward(x: Tensor, mask: Tensor | None, *, scale: float, floor: float) -> tuple[Tensor, Tensor]:
    """Implement `fastvq.ops.binary_assign_forward`."""
    codes = _signs(x.shape[2], x.device)
    mask = row_mask(x, mask)
    entropy = x.new_zeros(x.shape[:2], dtype=torch.float64)
    mean = x.new_zeros((x.shape[0], len(codes)), dtype=torch.float64)
    rows = chunk_rows(len(codes))
    for g in range(x.shape[0]):
        for first in range(0, x.shape[1], rows):
            part = slice(first, first + rows)
            part_mask = mask[g, part, None]
            p = (scale * widen(x[g, part]).masked_fill(~part_mask, 0) @ codes.T).softmax(1).masked_fill(~part_mask, 0)
            entropy[g, part] = entropy_terms(p, floor).sum(1)
            mean[g] += p.sum(0)
    dtype = compute_dtype(x)
    return entropy.to(dtype), (mean / mask.sum(1, keepdim=True).clamp_min(1)).to(dtype)


def binary_assign_backward(
    x: Tensor,
    mask: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    *,
    scale: float,
    floor: float,
) -> Tensor:
    """Implement `fastvq.ops.binary_assign_backward`."""
    codes = _signs(x.shape[2], x.device)
    mask = row_mask(x, mask)
    x_grad = x.new_zeros(x.shape, dtype=torch.float64)
    rows = chunk_rows(len(codes))
    for g in range(x.shape[0]):
        for first in range(0, x.shape[1], rows):
            part = slice(first, first + rows)
            part_mask = mask[g, part, None]
            p = (scale * widen(x[g, part]).masked_fill(~part_mask, 0) @ codes.T).softmax(1).masked_fill(~part_mask, 0)
            p_grad = torch.zeros_like(p)
            if entropy_grad is not None:
                p_grad += entropy_grad[g, part, None].double() * entropy_slope(p, floor)
            if mean_grad is not None:
                p_grad += mean_grad[g].double() / mask[g].sum().clamp_min(1)
            logit_grad = p * (p_grad - (p * p_grad).sum(1, keepdim=True))
            x_grad[g, part] = scale * logit_grad @ codes
    return x_grad.to(compute_dtype(x))
