"""The op `residual_quantize` by definition: the op `quantize`, stage after stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype, stages_of

from .quantize import quantize_backward, quantize_forward


def residual_quantize_forward(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.residual_quantize_forward`."""
    residual = x.to(compute_dtype(x, codebooks[0]))
    quantized = torch.zeros_like(residual)
    errors, residuals = [], []
    for codebook, stage in zip(stages_of(codebooks), indices.unbind(1), strict=True):
        codes, _, error = quantize_forward(residual, codebook, stage, False)
        errors.append(error)
        residuals.append(residual)
        residual = residual - codes
        quantized = quantized + codes
    stacked = torch.stack(residuals) if keep_residuals else residual.new_empty(0, *x.shape)
    return quantized.to(x.dtype, copy=True), torch.stack(errors), stacked


def residual_quantize_backward(
    x: Tensor,
    codebooks: Sequence[Tensor],
    indices: Tensor,
    quantized_grad: Tensor,
    error_grads: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    """Implement `fastvq.ops.residual_quantize_backward`."""
    residual, grad = x.to(error_grads.dtype), quantized_grad.to(error_grads.dtype)
    x_grad = torch.zeros_like(residual)
    for codebook, stage, error_grad in zip(stages_of(codebooks), indices.unbind(1), error_grads, strict=True):
        codes, _, _ = quantize_forward(residual, codebook, stage, False)
        x_grad += quantize_backward(
            residual, codes, stage, grad, error_grad, gradient=gradient, commitment_weight=commitment_weight
        )
        residual = residual - codes
    return x_grad.to(x.dtype)
