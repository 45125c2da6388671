"""The op `residual_quantize`: the kernels of `quantize`, which go through all stages in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quantize import WIDEST, quantize_backward, quantize_forward, run_backward, run_forward


def residual_quantize_forward(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.residual_quantize_forward`."""
    return run_forward(x, codebooks, indices, False, keep_residuals)


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
    if gradient == "ste" or x.shape[1] <= WIDEST:
        return run_backward(
            x, codebooks, indices, quantized_grad, error_grads, gradient, commitment_weight, gather=True
        )
    # The rotation needs inner products of whole residuals, which don't fit into a program: one launch a stage.
    residual, grad = x.to(error_grads.dtype), quantized_grad.to(error_grads.dtype)
    total = torch.zeros_like(residual)
    options: dict[str, Any] = {"gradient": gradient, "commitment_weight": commitment_weight}
    for codebook, index, error_grad in zip(codebooks, indices.unbind(1), error_grads, strict=True):
        codes, _, _ = quantize_forward(residual, codebook, index, False)
        total += quantize_backward(residual, codes, index, grad, error_grad, **options)
        residual = residual - codes
    return total.to(x.dtype)


def aot_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return no cases: the kernels are those of `quantize`, whose cases have several stages too."""
    return []
