"""The op `quantize` in torch operations, none of which waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.backends.arithmetic import (
    SHORTEST,
    check_index_range,
    compute_dtype,
    difference,
    half_difference,
    power_of_two_below,
)


def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.quantize_forward`."""
    check_index_range(indices, codebook.shape[0])
    mask = (indices >= 0)[:, None]
    codes = lookup(codebook.to(compute_dtype(x, codebook)), indices, mask)
    error = mean_square(difference(x, codes, mask), mask)
    # The outputs never share memory: the caller may write to one of them.
    quantized = codes.to(x.dtype, copy=True)
    return quantized, codes if keep_codes else codes.new_empty(0, x.shape[1]), error


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
    mask = (indices >= 0)[:, None]
    return row_gradients(x, codes, mask, quantized_grad, loss_grad, gradient, commitment_weight).to(x.dtype)


def lookup(codebook: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
    """Return the codes (N, D) of `indices` (N,), zero in the rows that `mask` (N, 1) excludes."""
    return F.embedding(indices.clamp_min(0), codebook).masked_fill_(~mask, 0)


def mean_square(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean square of `error` (N, D), which is overwritten, over the rows of `mask` (N, 1)."""
    if error.numel() == 0:
        return error.new_zeros(())
    shrink = power_of_two_below(torch.linalg.vector_norm(error, torch.inf))  # 1, but for squares that would overflow
    return error.mul_(shrink).square_().sum() / (mask.sum() * error.shape[1]).clamp_min(1) / shrink / shrink


def row_gradients(
    x: Tensor,
    codes: Tensor,
    mask: Tensor,
    quantized_grad: Tensor,
    loss_grad: Tensor,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    """Return the gradient of `x` (N, D) in the dtype of the codes, for rows whose codes are known."""
    grad = quantized_grad.to(codes.dtype).masked_fill(~mask, 0)
    if gradient == "rotation":
        grad = _rotate_back(grad.double(), x.double(), codes.double(), mask).to(codes.dtype)
    if commitment_weight:
        elements = (mask.sum() * x.shape[1]).clamp_min(1)
        grad.addcmul_(half_difference(x, codes, mask), 4 * commitment_weight * loss_grad / elements)
    return grad


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Return lambda R^T grad, with one factor a row for each of grad, u and u + v.

    The rotation R = I - 2 w w^T + 2 v u^T takes u = x / |x| to v = e / |e|, with w = (u + v) / |u + v|. Then

        lambda R^T grad = lambda (grad + 2 <v, grad> u - 2 <u + v, grad> / |u + v|^2 (u + v))

    It is computed in float64, which keeps the digits of u + v for opposite vectors.
    """
    x_length, code_length = x.norm(dim=1, keepdim=True), codes.norm(dim=1, keepdim=True)
    directed = mask & (x_length >= SHORTEST) & (code_length >= SHORTEST)
    u, v = (x / x_length).masked_fill_(~directed, 0), (codes / code_length).masked_fill_(~directed, 0)
    along_v = (v * grad).sum(1, keepdim=True)
    both = v.add_(u)
    bisector = (both * grad).sum(1, keepdim=True) / both.square().sum(1, keepdim=True).clamp_min(SHORTEST**2)
    rotated = torch.addcmul(grad, u, 2 * along_v).addcmul_(both, -2 * bisector)
    return rotated.mul_(torch.where(directed, code_length / x_length, 1))
