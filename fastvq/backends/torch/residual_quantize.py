"""The op `residual_quantize` in torch operations: lookup, difference and sum of each stage, and no copy beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range, compute_dtype, stages_of

from .quantize import lookup, mean_square, row_gradients


def residual_quantize_forward(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.residual_quantize_forward`."""
    stages, dtype = stages_of(codebooks), compute_dtype(x, codebooks[0])
    for codebook, stage in zip(stages, indices.unbind(1), strict=True):
        check_index_range(stage, len(codebook))
    residual = x.to(dtype)
    total = torch.zeros_like(residual)
    errors, residuals = [], []
    for codebook, stage in zip(stages, indices.unbind(1), strict=True):
        mask = (stage >= 0)[:, None]
        codes = lookup(codebook.to(dtype), stage, mask)
        if keep_residuals:
            residuals.append(residual)
        residual = residual - codes
        total += codes
        errors.append(mean_square(residual.masked_fill(~mask, 0), mask))
    stacked = torch.stack(residuals) if keep_residuals else residual.new_empty(0, *x.shape)
    return total.to(x.dtype), torch.stack(errors), stacked


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
    residual = x.to(error_grads.dtype)
    total = torch.zeros_like(residual)
    for codebook, stage, error_grad in zip(stages_of(codebooks), indices.unbind(1), error_grads, strict=True):
        mask = (stage >= 0)[:, None]
        codes = lookup(codebook.to(error_grads.dtype), stage, mask)
        total += row_gradients(residual, codes, mask, quantized_grad, error_grad, gradient, commitment_weight)
        residual = residual - codes
    return total.to(x.dtype)
