"""The op `residual_quantize` in torch operations: lookup, difference and sum of each stage, and no copy beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range, compute_dtype

from .quantize import lookup, mean_square, row_gradients


def residual_quantize_forward(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.residual_quantize_forward`."""
    check_index_range(indices, codebooks.shape[1])
    codebooks = codebooks.to(compute_dtype(x, codebooks))
    residual = x.to(codebooks.dtype)
    total = torch.zeros_like(residual)
    errors, residuals = [], []
    for codebook, stage in zip(codebooks, indices.unbind(1), strict=True):
        mask = (stage >= 0)[:, None]
        codes = lookup(codebook, stage, mask)
        if keep_residuals:
            residuals.append(residual)
        residual = residual - codes
        total += codes
        errors.append(mean_square(residual.masked_fill(~mask, 0), mask))
    stacked = torch.stack(residuals) if keep_residuals else residual.new_empty(0, *x.shape)
    return total.to(x.dtype), torch.stack(errors), stacked


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
    """Implement `fastvq.ops.residual_quantize_backward`."""
    codebooks = codebooks.to(error_grads.dtype)
    residual = x.to(error_grads.dtype)
    total = torch.zeros_like(residual)
    for codebook, stage, error_grad in zip(codebooks, indices.unbind(1), error_grads, strict=True):
        mask = (stage >= 0)[:, None]
        codes = lookup(codebook, stage, mask)
        total += row_gradients(residual, codes, mask, quantized_grad, error_grad, gradient, commitment_weight)
        residual = residual - codes
    return total.to(x.dtype)
