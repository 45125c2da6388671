"""Quantization as a differentiable function: search, lookup, gradient estimator and losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvq.backends.reference import SHORTEST, compute_dtype, difference
from fastvq.ops import (
    GRADIENTS,
    accumulate,
    quantize_backward,
    quantize_forward,
    residual_quantize_backward,
    residual_quantize_forward,
    residual_search,
    search,
)


def unit_norm(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-6) along the last dimension: what metric="dot" searches for cosine similarity."""
    return F.normalize(x, dim=-1, eps=SHORTEST)


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes of `indices` (...,) from `codebook` (K, D), as (..., D); index -1 gives zeros. Differentiable."""
    codes = F.embedding(indices.clamp_min(0), codebook)
    return codes.masked_fill((indices < 0).unsqueeze(-1), 0)


class Quantized(NamedTuple):
    """What `quantize` returns."""

    quantized: Tensor  # (..., D), dtype of x
    indices: Tensor  # (...) int64
    loss: Tensor  # () float32, or float64


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    gradient: str = "ste",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> Quantized:
    """The nearest code of each vector, with a gradient for the encoder and the losses of VQ-VAE.

        quantized_n = e_{index_n}
        loss = commitment_weight mean (x - sg[quantized])^2 + codebook_weight mean (sg[x] - quantized)^2

    with means over the D elements of the rows that count, those that are finite and not masked out. The others have
    index -1, a zero output, a zero gradient and no part in the loss.

    Args:
        x: vectors (..., D), any floating dtype, any leading shape.
        codebook: codes (K, D). It receives a gradient from the loss where codebook_weight isn't zero, never from
            `quantized`.
        metric: "l2" or "dot", as in `search`.
        gradient: how the gradient g of `quantized` reaches x. "ste", straight-through: g itself. "rotation": as if
            `quantized` were lambda R x with R the rotation that takes x's direction to e's and lambda = |e| / |x|, both
            held constant, so lambda R^T g; where x or e is shorter than 1e-6, g itself.
        commitment_weight, codebook_weight: factors of the two losses; beta of the paper is commitment_weight beside
            codebook_weight = 1.
        mask: bool (...), True for the rows that count.
        indices: int64 (...), what `search` would return for x, where that is known already.

    Returns:
        quantized (..., D), exactly the codes, rounded to x's dtype; indices (...) int64; loss ().

    Raises:
        TypeError, ValueError: as `search`; also for a mask that isn't bool or doesn't fit, a negative weight and an
        unknown gradient.

    Numerics: losses are computed in float32 for x in half precision, in float64 for x or codebook in float64.
    Memory is O(N D + K D), forward and backward.

    Source: van den Oord et al. 2017, equation 3 (losses, straight-through); Fifty et al., Restructuring Vector
    Quantization with the Rotation Trick, 2024, section 4.2 (rotation).
    """
    _check_choices(gradient, commitment_weight=commitment_weight, codebook_weight=codebook_weight)
    rows = _rows(x)
    kept = None if mask is None else rows_of_mask(mask, x.shape[:-1])
    if indices is None:
        indices = search(rows.detach(), codebook.detach(), metric=metric, mask=kept)
    else:
        indices = _given(indices, x.shape[:-1])
        indices = indices if x.dim() == 2 else indices.reshape(-1)
        if kept is not None:
            indices = indices.masked_fill(~kept, -1)
    if _differentiates(rows, codebook):
        quantized, loss = _Quantize.apply(rows, codebook, indices, gradient, commitment_weight, codebook_weight)
    else:
        quantized, _, error = quantize_forward(rows, codebook, indices, False)
        loss = _weighted(error, commitment_weight + codebook_weight)
    if x.dim() != 2:
        quantized, indices = quantized.reshape(x.shape), indices.reshape(x.shape[:-1])
    return Quantized(quantized, indices, loss)


def _differentiates(*tensors: Tensor) -> bool:
    """Whether a gradient can flow to one of them. Without, plain ops are called: TorchScript can't save a Function."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _weighted(error: Tensor, weight: float) -> Tensor:
    if weight == 1:
        return error
    return error * weight if weight else torch.zeros_like(error)


def rows_of_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """`mask` flattened to (N,), checked against the leading shape of the vectors."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: must be bool, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask: must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    return mask.reshape(-1)


def _check_choices(gradient: str, **weights: float) -> None:
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name}: must not be negative, got {weight}")


def _rows(x: Tensor) -> Tensor:
    if x.dim() == 0:
        raise ValueError("x: must have shape (..., D), got a scalar")
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _given(indices: Tensor, shape: torch.Size) -> Tensor:
    if indices.shape != shape:
        raise ValueError(f"indices: must have shape {tuple(shape)} beside x, got {tuple(indices.shape)}")
    return indices


class _Quantize(torch.autograd.Function):
    """(quantized, loss) of rows whose indices are known. The backward is written out: no graph of the forward is kept,
    and neither pass holds more than N x D."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codebook: Tensor,
        indices: Tensor,
        gradient: str,
        commitment_weight: float,
        codebook_weight: float,
    ) -> tuple[Tensor, Tensor]:
        quantized, codes, error = quantize_forward(x, codebook, indices, any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(x, codes, indices)
        ctx.gradient, ctx.codebook_shape, ctx.codebook_dtype = gradient, codebook.shape, codebook.dtype
        ctx.commitment_weight, ctx.codebook_weight = commitment_weight, codebook_weight
        return quantized, _weighted(error, commitment_weight + codebook_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, quantized_grad: Tensor, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, indices = ctx.saved_tensors
        need_x, need_codebook = ctx.needs_input_grad[:2]
        x_grad = codebook_grad = None
        if need_x:
            x_grad = quantize_backward(
                x,
                codes,
                indices,
                quantized_grad,
                loss_grad,
                gradient=ctx.gradient,
                commitment_weight=float(ctx.commitment_weight),
            )
        if need_codebook:
            codebook_grad = codes.new_zeros(ctx.codebook_shape, dtype=ctx.codebook_dtype)
            if ctx.codebook_weight:
                counted = (indices >= 0)[:, None]
                elements = (counted.sum() * x.shape[1]).clamp_min(1)
                pull = difference(x, codes, counted) * (2 * loss_grad / elements)
                _, sums = accumulate(pull, indices, len(codebook_grad))
                codebook_grad = (-ctx.codebook_weight * sums).to(ctx.codebook_dtype)
        return x_grad, codebook_grad, None, None, None, None


class ResidualQuantized(NamedTuple):
    """What `residual_quantize` returns."""

    quantized: Tensor  # (..., D), dtype of x
    indices: Tensor  # (..., Q) int64
    losses: Tensor  # (Q,) float32, or float64
    residuals: Tensor  # (Q, ..., D) in the dtype of the losses, or empty; no gradient


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    *,
    gradient: str = "ste",
    commitment_weight: float = 1.0,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
    keep_residuals: bool = False,
    copy_codebooks: bool = True,
) -> ResidualQuantized:
    """`quantize` by a stack of codebooks, each for what the ones before it left over.

        r_0 = x,   quantized = sum_q e_{q,index_q},   r_{q+1} = r_q - sg[e_{q,index_q}]
        loss_q = commitment_weight mean (r_q - sg[e_{q,index_q}])^2

    Rows that don't count, because they aren't finite or masked out, are treated as by `quantize`.

    Args:
        x: vectors (..., D), any floating dtype.
        codebooks: codes (Q, K, D). They get no gradient.
        gradient: "ste" or "rotation", as in `quantize`, at every level. x gets the sum over the levels, as when levels
            are stacked by hand: Q times the gradient of quantized, for "ste".
        commitment_weight: factor of the losses.
        mask: bool (...), True for the rows that count.
        indices: int64 (..., Q), what `residual_search` would return for x, where that is known already; -1 also for
            levels that are left out.
        keep_residuals: return the r_q, from which the codebooks can learn.
        copy_codebooks: hold a copy of the codebooks for the backward, so that they may learn before it. False saves
            it where they are a copy already.

    Returns:
        quantized (..., D); indices (..., Q) int64; losses (Q,); residuals (Q, ..., D), or an empty (0, ..., D).

    Raises:
        TypeError, ValueError: as `quantize`.

    Numerics: arithmetic is in float32, or in float64 where an argument is; quantized is rounded to x's dtype once.
    Memory is O(N D + Q K D), and Q N D for the residuals.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    _check_choices(gradient, commitment_weight=commitment_weight)
    rows = _rows(x)
    kept = None if mask is None else rows_of_mask(mask, x.shape[:-1])
    if indices is None:
        indices = residual_search(rows.detach(), codebooks.detach(), mask=kept)
    else:
        indices = _given(indices, torch.Size([*x.shape[:-1], len(codebooks)]))
        indices = indices if x.dim() == 2 else indices.reshape(-1, len(codebooks))
        if kept is not None:
            indices = indices.masked_fill(~kept[:, None], -1)
    held = codebooks.detach()
    if _differentiates(rows):
        held = held.clone() if copy_codebooks else held
        quantized, losses, residuals = _ResidualQuantize.apply(
            rows, held, indices, gradient, commitment_weight, keep_residuals
        )
    else:
        quantized, errors, residuals = residual_quantize_forward(rows, held, indices, keep_residuals)
        losses = _weighted(errors, commitment_weight)
    if x.dim() != 2:
        quantized, indices = quantized.reshape(x.shape), indices.reshape(*x.shape[:-1], len(codebooks))
        residuals = residuals.reshape(len(residuals), *x.shape)
    return ResidualQuantized(quantized, indices, losses, residuals)


class _ResidualQuantize(torch.autograd.Function):
    """(quantized, losses, residuals) of rows whose indices are known; the backward walks the levels again, so that no
    residual is kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codebooks: Tensor,
        indices: Tensor,
        gradient: str,
        commitment_weight: float,
        keep_residuals: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        quantized, errors, residuals = residual_quantize_forward(x, codebooks, indices, keep_residuals)
        ctx.save_for_backward(x, codebooks, indices)
        ctx.mark_non_differentiable(residuals)
        ctx.set_materialize_grads(False)  # zeros for the residuals would be the largest tensor here
        ctx.gradient, ctx.commitment_weight = gradient, commitment_weight
        return quantized, _weighted(errors, commitment_weight), residuals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, quantized_grad: Tensor | None, loss_grads: Tensor | None, _: None) -> tuple[Any, ...]:
        x, codebooks, indices = ctx.saved_tensors
        if quantized_grad is None:
            quantized_grad = torch.zeros_like(x)
        if loss_grads is None:
            loss_grads = codebooks.new_zeros(len(codebooks), dtype=compute_dtype(x, codebooks))
        x_grad = residual_quantize_backward(
            x,
            codebooks,
            indices,
            quantized_grad,
            loss_grads,
            gradient=ctx.gradient,
            commitment_weight=float(ctx.commitment_weight),
        )
        return x_grad, None, None, None, None, None
