"""The op `residual_quantize`: the kernels of `quantize`, which go through all stages in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype, joined, stages_of

from .quantize import WIDEST, quantize_backward, quantize_forward, run_backward, run_forward


def residual_quantize_forward(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.residual_quantize_forward`: stages of one size in one launch, others one by one."""
    stack = joined(codebooks)
    if stack is not None:
        return run_forward(x, stack, indices, False, keep_residuals)
    residual = x.to(compute_dtype(x, codebooks[0]))
    total = torch.zeros_like(residual)
    errors, residuals = [], []
    for codebook, index in zip(stages_of(codebooks), indices.unbind(1), strict=True):
        codes, _, error = quantize_forward(residual, codebook, index, False)
        errors.append(error)
        residuals.append(residual)
        residual, total = residual - codes, total + codes
    kept = torch.stack(residuals) if keep_residuals else residual.new_empty(0, *x.shape)
    return total.to(x.dtype), torch.stack(errors), kept


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
    stack = joined(codebooks)
    if stack is not None and (gradient == "ste" or x.shape[1] <= WIDEST):
        return run_backward(x, stack, indices, quantized_grad, error_grads, gradient, commitment_weight, gather=True)
    # The rotation needs inner products of whole residuals, which don't fit into a program: one launch a stage, as for
    # stages that differ in size.
    residual, grad = x.to(error_grads.dtype), quantized_grad.to(error_grads.dtype)
    total = torch.zeros_like(residual)
    options: dict[str, Any] = {"gradient": gradient, "commitment_weight": commitment_weight}
    for codebook, index, error_grad in zip(stages_of(codebooks), indices.unbind(1), error_grads, strict=True):
        codes, _, _ = quantize_forward(residual, codebook, index, False)
        total += quantize_backward(residual, codes, index, grad, error_grad, **options)
        residual = residual - codes
    return total.to(x.dtype)


def aot_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return no cases: the kernels are those of `quantize`, whose cases have several stages too."""
    return []
