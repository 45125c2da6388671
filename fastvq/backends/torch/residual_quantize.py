"""The op `residual_quantize` in torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype

from .quantize import quantize_backward, quantize_forward


def residual_quantize_forward(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastvq.ops.residual_quantize_forward`, level by level."""
    residual = x.to(compute_dtype(x, codebooks))
    total = torch.zeros_like(residual)
    errors, residuals = [], []
    for codebook, level in zip(codebooks, indices.unbind(1), strict=True):
        codes, _, error = quantize_forward(residual, codebook, level, False)
        errors.append(error)
        residuals.append(residual)
        residual = residual - codes
        total = total + codes
    kept = torch.stack(residuals) if keep_residuals else residual.new_empty(0, *x.shape)
    return total.to(x.dtype, copy=True), torch.stack(errors), kept


def residual_quantize_backward(
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    quantized_grad: Tensor,
    error_grads: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    """`fastvq.ops.residual_quantize_backward`, level by level."""
    residual = x.to(error_grads.dtype)
    grad = quantized_grad.to(residual.dtype)
    total = torch.zeros_like(residual)
    options: dict[str, Any] = {"gradient": gradient, "commitment_weight": commitment_weight}
    for codebook, level, error_grad in zip(codebooks, indices.unbind(1), error_grads, strict=True):
        codes, _, _ = quantize_forward(residual, codebook, level, False)
        total = total + quantize_backward(residual, codes, level, grad, error_grad, **options)
        residual = residual - codes
    return total.to(x.dtype)
