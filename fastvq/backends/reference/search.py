"""The nearest codes: by definition, in float64, chunk by chunk."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements of the largest temporary tensor."""


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


def scores_by_definition(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The number of section "The definition" for each pair, smaller is nearer: [n, K] of x [n, D] in float64."""
    scores = x.new_zeros(x.shape[0], codebook.shape[0])
    for x_j, e_j in zip(x.unbind(1), codebook.unbind(1), strict=True):
        if metric == "l2":
            difference = x_j[:, None] - e_j[None, :]
            scores += difference * difference
        else:
            scores -= x_j[:, None] * e_j[None, :]
    # Only float64 input of more than 1e154 can overflow to a NaN between finite rows: infinitely far, then.
    return scores.masked_fill(scores.isnan(), torch.inf)


def _search_rows(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    size = codebook.shape[0]
    scores = scores_by_definition(x, codebook, metric)
    usable = codebook.isfinite().all(1)
    smallest = scores.masked_fill(~usable, torch.inf).amin(1, keepdim=True)
    ties = (scores == smallest) & usable
    lowest = torch.where(ties, torch.arange(size, device=x.device), size).amin(1)
    answered = x.isfinite().all(1) & (lowest < size)
    return torch.where(answered, lowest, -1)


def topk_search(x: Tensor, codebook: Tensor, k: int, *, metric: str = "l2") -> Tensor:
    """The nearest codes in order: `fastvq.topk_search` defines what this computes."""
    indices = x.new_empty((*x.shape[:-1], k), dtype=torch.int64)
    if x.dim() == 3:
        for xh, eh, out in zip(x, codebook, indices, strict=True):
            out.copy_(topk_search(xh, eh, k, metric=metric))
        return indices
    usable = codebook.isfinite().all(1)
    rows = max(1, CHUNK_ELEMENTS // codebook.shape[0])
    for chunk, out in zip(x.split(rows), indices.split(rows), strict=True):
        wide = widen(chunk)
        by_score = scores_by_definition(wide, widen(codebook), metric).argsort(dim=1, stable=True)
        usable_first = by_score.gather(1, (~usable)[by_score].byte().argsort(dim=1, stable=True))[:, :k]
        answered = wide.isfinite().all(1)[:, None] & usable[usable_first]
        out.copy_(torch.where(answered, usable_first, -1))
    return indices


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


def compute_dtype(x: Tensor, codebook: Tensor) -> torch.dtype:
    """float32, or float64 where either argument is."""
    return torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
