"""The specification: every op in plain PyTorch, written to be read and checked, not to be fast.

Every other backend must return the same indices as `search` here, to the last one. No N x K matrix exists at any time:
rows are taken in chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements of the largest temporary tensor."""


Ops = dict[str, Callable[..., Any]]
"""A backend's implementations, by the name of the op."""


class Search(Protocol):
    def __call__(self, x: Tensor, codebook: Tensor, *, metric: str = ...) -> Tensor: ...


def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Exact nearest codes: `fastvq.search` defines what this computes."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if x.dim() == 3:
        for xh, eh, out in zip(x, codebook, indices, strict=True):
            out.copy_(search(xh, eh, metric=metric))
        return indices
    rows = max(1, CHUNK_ELEMENTS // codebook.shape[0])
    for chunk, out in zip(x.split(rows), indices.split(rows), strict=True):
        out.copy_(_search_rows(widen(chunk), widen(codebook), metric))
    return indices


def widen(x: Tensor) -> Tensor:
    """x in float64, exactly: `double()` except where the user had torch.set_flush_denormal(True), which makes the
    processor read denormals as zero. Those are then read as the integers that they are, in units of 2^-149."""
    wide = x.double()
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or not _flushes_denormals():
        return wide
    bits = x.view(torch.int32) if x.dtype == torch.float32 else x.view(torch.int16).int() << 16
    magnitude = bits & 0x7FFFFFFF
    denormal = magnitude * bits.sign() * torch.full((), 2.0**-149, dtype=torch.float64)
    return torch.where(magnitude < 0x00800000, denormal, wide)


def _flushes_denormals() -> bool:
    smallest = torch.ones((), dtype=torch.int32).view(torch.float32)
    return smallest.double().item() == 0


def _search_rows(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    size = codebook.shape[0]
    scores = x.new_zeros(x.shape[0], size)  # [n, K], float64
    for x_j, e_j in zip(x.unbind(1), codebook.unbind(1), strict=True):
        if metric == "l2":
            difference = x_j[:, None] - e_j[None, :]
            scores += difference * difference
        else:
            scores -= x_j[:, None] * e_j[None, :]
    # Only float64 input of more than 1e154 can overflow to a NaN between finite rows: infinitely far, then.
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    usable = codebook.isfinite().all(1)
    smallest = scores.masked_fill(~usable, torch.inf).amin(1, keepdim=True)
    ties = (scores == smallest) & usable
    lowest = torch.where(ties, torch.arange(size, device=x.device), size).amin(1)
    answered = x.isfinite().all(1) & (lowest < size)
    return torch.where(answered, lowest, -1)


def residual_search(x: Tensor, codebooks: Tensor, *, search: Search = search) -> Tensor:
    """`fastvq.residual_search`, level by level. `search` lets a backend compose the same definition from its own."""
    residual = x
    levels = []
    for codebook in codebooks:
        indices = search(residual, codebook)
        levels.append(indices)
        codes = codebook[indices.clamp_min(0)].masked_fill((indices < 0)[:, None], 0)
        dtype = compute_dtype(residual, codebook)
        residual = (residual.to(dtype) - codes.to(dtype)).float()
    return torch.stack(levels, 1)


def check_indices(indices: Tensor, codebook_size: int) -> None:
    """IndexError where one lies outside [-1, codebook_size), on the CPU: elsewhere the device asserts when it uses
    them, since looking here would wait for it."""
    if indices.device.type == "cpu":
        outside = indices[(indices < -1) | (indices >= codebook_size)]
        if len(outside):
            raise IndexError(f"indices: must lie in [-1, {codebook_size}), got {int(outside[0])}")


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """`fastvq.accumulate`: float64 sums over the rows in ascending order, rounded to float32 once."""
    check_indices(indices, codebook_size)
    # Row `codebook_size` takes what is skipped.
    counts = x.new_zeros(codebook_size + 1, dtype=torch.float64)
    sums = x.new_zeros(codebook_size + 1, x.shape[1], dtype=torch.float64)
    rows = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for chunk, index in zip(x.split(rows), indices.split(rows), strict=True):
        slot = torch.where(index < 0, codebook_size, index)
        counts.index_add_(0, slot, counts.new_ones(slot.shape))
        sums.index_add_(0, slot, chunk.double())
    return counts[:-1].float(), sums[:-1].float()


SHORTEST = 1e-6
"""Length under which a vector has no direction to rotate from; also the floor of `fastvq.functional.unit_norm`."""


def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`fastvq.ops.quantize_forward`."""
    check_indices(indices, codebook.shape[0])
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


def compute_dtype(x: Tensor, codebook: Tensor) -> torch.dtype:
    """float32, or float64 where either argument is."""
    return torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)


def difference(x: Tensor, codes: Tensor, counted: Tensor) -> Tensor:
    """x - codes in the dtype of the codes, zero in the rows that aren't counted."""
    return (x.to(codes.dtype) - codes).masked_fill_(~counted, 0)


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


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
) -> None:
    """`fastvq.ema_update_`."""
    cluster_size.lerp_(counts, 1 - decay)
    embed_avg.lerp_(sums, 1 - decay)
    total = cluster_size.sum(dtype=torch.float64)
    smoothed = ((cluster_size + eps) / (total + len(cluster_size) * eps) * total).float()[:, None]
    codebook.copy_(torch.where(smoothed > 0, embed_avg / smoothed, codebook))


OPS: Ops = {
    "search": search,
    "residual_search": functools.partial(residual_search, search=search),
    "quantize_forward": quantize_forward,
    "quantize_backward": quantize_backward,
    "residual_quantize_forward": residual_quantize_forward,
    "residual_quantize_backward": residual_quantize_backward,
    "accumulate": accumulate,
    "ema_update_": ema_update_,
}
