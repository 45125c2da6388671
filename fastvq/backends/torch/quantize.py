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
        grad = _rotate_back(grad, x.to(codes.dtype), codes, mask)
    if commitment_weight:
        elements = (mask.sum() * x.shape[1]).clamp_min(1)
        grad.addcmul_(half_difference(x, codes, mask), 4 * commitment_weight * loss_grad / elements)
    return grad


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Return lambda R^T grad, with one factor a row for each of grad, u and v.

    The rotation R = I - 2 w w^T + 2 v u^T takes u = x / |x| to v = e / |e|, with w = (u + v) / |u + v|. Then

        lambda R^T grad = lambda (grad + 2 <v, grad> u - 2 <u + v, grad> / |u + v|^2 (u + v))
    """
    (u, x_length, x_shrink), (v, code_length, code_shrink) = _direction(x), _direction(codes)
    directed = mask & (x_length >= SHORTEST * x_shrink) & (code_length >= SHORTEST * code_shrink)
    u, v = u.masked_fill_(~directed, 0), v.masked_fill_(~directed, 0)
    along_u, along_v = (u * grad).sum(1, keepdim=True), (v * grad).sum(1, keepdim=True)
    bisector = (along_u + along_v) / (u + v).square_().sum(1, keepdim=True).clamp_min(SHORTEST**2)
    rotated = torch.addcmul(grad, u, 2 * (along_v - bisector)).addcmul_(v, -2 * bisector)
    # lambda itself may overflow where its product with a small gradient does not.
    rotated.mul_(torch.where(directed, code_length / x_length, 1))
    return rotated.mul_(torch.where(directed, x_shrink / code_shrink, 1))


def _direction(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (N, D) of unit length, their lengths (N, 1) times a factor, and that factor: 1 but for giant rows."""
    shrink = power_of_two_below(torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True))
    small = rows * shrink
    length = small.norm(dim=1, keepdim=True)
    return small.div_(length), length, shrink
