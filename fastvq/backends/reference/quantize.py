"""The op `quantize` by definition: losses and gradients in float64, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import SHORTEST, check_index_range, compute_dtype


def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.quantize_forward`."""
    check_index_range(indices, codebook.shape[0])
    dtype, mask = compute_dtype(x, codebook), indices >= 0
    codes = x.new_zeros(x.shape, dtype=dtype)
    codes[mask] = codebook[indices[mask]].to(dtype)
    squares = (x[mask].double() - codes[mask].double()).square()
    error = squares.sum() / max(1, squares.numel())
    # The outputs never share memory: the caller may write to one of them.
    return codes.to(x.dtype, copy=True), codes if keep_codes else codes.new_empty(0, x.shape[1]), error.to(dtype)


def quantize_backward(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    quantized_grad: Tensor,
    loss_grad: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    """Implement `fastvq.ops.quantize_backward`."""
    mask = indices >= 0
    rows, chosen, grad = (tensor[mask].double() for tensor in (x, codes, quantized_grad))
    if gradient == "rotation":
        grad = _rotate_back(grad, rows, chosen)
    if commitment_weight:
        grad = grad + commitment_weight * 2 * loss_grad.double() * (rows - chosen) / max(1, rows.numel())
    x_grad = x.new_zeros(x.shape)
    x_grad[mask] = grad.to(x.dtype)
    return x_grad


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """Return lambda R^T grad for the rotation R that takes the direction of x to that of e.

        R = I - 2 w w^T + 2 v u^T,   u = x / |x|,   v = e / |e|,   w = (u + v) / |u + v|,   lambda = |e| / |x|

    Opposite directions have no w; there R = I + 2 v u^T. Where x or e is shorter than SHORTEST, return grad.
    """
    x_length, code_length = x.norm(dim=1, keepdim=True), codes.norm(dim=1, keepdim=True)
    u, v = x / x_length, codes / code_length
    w = (u + v) / (u + v).norm(dim=1, keepdim=True).clamp_min(SHORTEST)
    rotated = grad - 2 * w * (w * grad).sum(1, keepdim=True) + 2 * u * (v * grad).sum(1, keepdim=True)
    directed = (x_length >= SHORTEST) & (code_length >= SHORTEST)
    return torch.where(directed, code_length / x_length * rotated, grad)
