"""Quantization by one codebook as a differentiable function: search, lookup, gradient estimator and losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvq.backends.arithmetic import SHORTEST, difference
from fastvq.ops import GRADIENTS, accumulate, quantize_backward, quantize_forward, search


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
    check_choices(gradient, commitment_weight=commitment_weight, codebook_weight=codebook_weight)
    rows = flatten_rows(x)
    kept = None if mask is None else rows_of_mask(mask, x.shape[:-1])
    if indices is None:
        indices = search(rows.detach(), codebook.detach(), metric=metric, mask=kept)
    else:
        indices = checked_indices(indices, x.shape[:-1])
        indices = indices if x.dim() == 2 else indices.reshape(-1)
        if kept is not None:
            indices = indices.masked_fill(~kept, -1)
    if differentiates(rows, codebook):
        quantized, loss = _Quantize.apply(rows, codebook, indices, gradient, commitment_weight, codebook_weight)
    else:
        quantized, _, error = quantize_forward(rows, codebook, indices, False)
        loss = weighted(error, commitment_weight + codebook_weight)
    if x.dim() != 2:
        quantized, indices = quantized.reshape(x.shape), indices.reshape(x.shape[:-1])
    return Quantized(quantized, indices, loss)


def differentiates(*tensors: Tensor) -> bool:
    """Whether a gradient can flow to one of them. Without, plain ops are called: TorchScript can't save a Function."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def weighted(error: Tensor, weight: float) -> Tensor:
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


def check_choices(gradient: str, **weights: float) -> None:
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name}: must not be negative, got {weight}")


def flatten_rows(x: Tensor) -> Tensor:
    if x.dim() == 0:
        raise ValueError("x: must have shape (..., D), got a scalar")
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def checked_indices(indices: Tensor, shape: torch.Size) -> Tensor:
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
        return quantized, weighted(error, commitment_weight + codebook_weight)

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
