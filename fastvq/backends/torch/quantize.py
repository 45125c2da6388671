"""The op `quantize` in torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.backends.arithmetic import SHORTEST, check_index_range, compute_dtype, difference


def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`fastvq.ops.quantize_forward`."""
    check_index_range(indices, codebook.shape[0])
    counted = (indices >= 0)[:, None]
    codes = F.embedding(indices.clamp_min(0), codebook.to(compute_dtype(x, codebook))).masked_fill(~counted, 0)
    elements = (counted.sum() * x.shape[1]).clamp_min(1)
    loss = difference(x, codes, counted).square_().sum() / elements
    # Never the tensor that is kept: what the caller does to one mustn't change the other.
    quantized = codes.to(x.dtype, copy=True)
    return quantized, codes if keep_codes else codes.new_empty(0, x.shape[1]), loss


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
    """`fastvq.ops.quantize_backward`."""
    counted = (indices >= 0)[:, None]
    grad = quantized_grad.to(codes.dtype).masked_fill(~counted, 0)
    if gradient == "rotation":
        grad = _rotate_back(grad, x.to(codes.dtype), codes, counted)
    if commitment_weight:
        elements = (counted.sum() * x.shape[1]).clamp_min(1)
        grad = grad + difference(x, codes, counted) * (2 * commitment_weight * loss_grad / elements)
    return grad.to(x.dtype)


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor, counted: Tensor) -> Tensor:
    """lambda R^T grad for the rotation R = I - 2 w w^T + 2 v u^T that takes u = x/|x| to v = e/|e|, w = (u+v)/|u+v|.

    Written as  lambda (grad + 2 <v, grad> u - 2 <u + v, grad> / |u + v|^2 (u + v)): one factor a row for each of
    grad, u and v.
    """
    x_length, code_length = x.norm(dim=1, keepdim=True), codes.norm(dim=1, keepdim=True)
    directed = counted & (x_length >= SHORTEST) & (code_length >= SHORTEST)
    u = (x / x_length).masked_fill_(~directed, 0)
    v = (codes / code_length).masked_fill_(~directed, 0)
    along_u, along_v = (u * grad).sum(1, keepdim=True), (v * grad).sum(1, keepdim=True)
    bisector = (along_u + along_v) / (u + v).square_().sum(1, keepdim=True).clamp_min(SHORTEST**2)
    stretch = torch.where(directed, code_length / x_length, 1)
    rotated = grad * stretch
    rotated.addcmul_(u, 2 * stretch * (along_v - bisector))
    return rotated.addcmul_(v, -2 * stretch * bisector)
