"""Residual quantization as a differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvq.backends.arithmetic import compute_dtype
from fastvq.ops import residual_quantize_backward, residual_quantize_forward, residual_search
from fastvq.ops.residual_search import Codebooks, as_list, stage_count

from .quantize import (
    check_choices,
    check_shape,
    check_some_code,
    differentiates,
    flatten_rows,
    rows_of_mask,
    weighted,
)


class ResidualQuantized(NamedTuple):
    """Result of `residual_quantize`."""

    quantized: Tensor  # (..., D), dtype of x
    indices: Tensor  # (..., Q) int64
    losses: Tensor  # (Q,) float32, or float64
    residuals: Tensor  # (Q, ..., D) in the dtype of the losses, or empty; no gradient


def residual_quantize(
    x: Tensor,
    codebooks: Codebooks,
    *,
    gradient: str = "ste",
    commitment_weight: float | Tensor = 1.0,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
    keep_residuals: bool = False,
    copy_codebooks: bool = True,
) -> ResidualQuantized:
    """Quantize by a stack of codebooks, each of which codes the residual of the one before.

        r_0 = x,   quantized = sum_q e_{q,index_q},   r_{q+1} = r_q - sg[e_{q,index_q}]
        loss_q = commitment_weight mean (r_q - sg[e_{q,index_q}])^2

    Non-finite and masked rows are excluded as by `quantize`.

    Args:
        x: vectors (..., D), any floating dtype.
        codebooks: codes (Q, K, D), or a sequence of them, as for `residual_search`. They get no gradient.
        gradient: "ste" or "rotation", as in `quantize`, at every stage. x gets the sum over the stages, as if the
            quantizers were stacked by hand: for "ste", Q times the gradient of quantized.
        commitment_weight: factor of the losses, a number or a tensor, () or (Q,).
        mask: bool (...), True for the rows that take part.
        indices: int64 (..., Q), the result of `residual_search` for x if it is known already, with -1 also for a stage
            that is left out.
        keep_residuals: whether to return the r_q, from which the codebooks can learn.
        copy_codebooks: keep a copy of the codebooks for the backward, so that they may learn before it. False saves
            the copy of codebooks that are a copy already.

    Returns:
        quantized (..., D); indices (..., Q) int64; losses (Q,); residuals (Q, ..., D), or an empty (0, ..., D).

    Raises:
        TypeError, ValueError: as `quantize`.

    Numerics: arithmetic is in float64 if an argument is float64, else in float32; quantized is rounded once, to
    x's dtype.
    Memory is O(N D + Q K D), and Q N D for the residuals.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    check_choices(gradient, commitment_weight=commitment_weight)
    rows = flatten_rows(x)
    row_mask = None if mask is None else rows_of_mask(mask, x.shape[:-1])
    held = list(map(Tensor.detach, codebooks if type(codebooks) is list else as_list(codebooks)))
    if indices is None:
        indices = residual_search(rows.detach(), held, mask=row_mask)
    else:
        check_shape(indices, torch.Size([*x.shape[:-1], stage_count(held)]))
        indices = indices if x.dim() == 2 else indices.reshape(-1, indices.shape[-1])
        if row_mask is not None:
            indices = indices.masked_fill(~row_mask[:, None], -1)
    check_some_code("codebooks", indices, held)
    if differentiates(rows):
        held = [codes.clone() for codes in held] if copy_codebooks else held
        quantized, errors, residuals = _ResidualQuantize.apply(rows, indices, gradient, keep_residuals, *held)
    else:
        quantized, errors, residuals = residual_quantize_forward(rows, held, indices, keep_residuals)
    losses = weighted(errors, commitment_weight)
    if x.dim() != 2:
        quantized, indices = quantized.reshape(x.shape), indices.reshape(*x.shape[:-1], indices.shape[-1])
        residuals = residuals.reshape(len(residuals), *x.shape)
    return ResidualQuantized(quantized, indices, losses, residuals)


class _ResidualQuantize(torch.autograd.Function):
    """(quantized, errors, residuals) of rows with known indices.

    The backward runs through the stages again, so that no residual is kept for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        indices: Tensor,
        gradient: str,
        keep_residuals: bool,
        *codebooks: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        quantized, errors, residuals = residual_quantize_forward(x, list(codebooks), indices, keep_residuals)
        ctx.save_for_backward(x, indices, *codebooks)
        ctx.mark_non_differentiable(residuals)
        ctx.set_materialize_grads(False)  # zeros for the residuals would be the largest tensor here
        ctx.gradient = gradient
        return quantized, errors, residuals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, quantized_grad: Tensor | None, loss_grads: Tensor | None, _: None) -> tuple[Any, ...]:
        x, indices, *codebooks = ctx.saved_tensors
        if quantized_grad is None:
            quantized_grad = torch.zeros_like(x)
        weight = 0.0 if loss_grads is None else 1.0
        if loss_grads is None:
            loss_grads = x.new_zeros(indices.shape[1], dtype=compute_dtype(x, codebooks[0]))
        x_grad = residual_quantize_backward(
            x,
            codebooks,
            indices,
            quantized_grad,
            loss_grads,
            gradient=ctx.gradient,
            commitment_weight=weight,
        )
        return (x_grad, *[None] * (3 + len(codebooks)))
