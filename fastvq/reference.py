"""The specification: every op in plain PyTorch, written to be read and checked, not to be fast.

Every other backend must return the same indices as `search` here, to the last one. No N x K matrix exists at any time:
rows are taken in chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
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
        residual = (residual.double() - codes.double()).float()
    return torch.stack(levels, 1)


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """`fastvq.accumulate`: float64 sums over the rows in ascending order, rounded to float32 once."""
    if indices.device.type == "cpu":  # index_add_ asserts elsewhere; looking here would wait for the device
        outside = indices[(indices < -1) | (indices >= codebook_size)]
        if len(outside):
            raise IndexError(f"indices: must lie in [-1, {codebook_size}), got {int(outside[0])}")
    # Row `codebook_size` takes what is skipped.
    counts = x.new_zeros(codebook_size + 1, dtype=torch.float64)
    sums = x.new_zeros(codebook_size + 1, x.shape[1], dtype=torch.float64)
    rows = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for chunk, index in zip(x.split(rows), indices.split(rows), strict=True):
        slot = torch.where(index < 0, codebook_size, index)
        counts.index_add_(0, slot, counts.new_ones(slot.shape))
        sums.index_add_(0, slot, chunk.double())
    return counts[:-1].float(), sums[:-1].float()


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
    "accumulate": accumulate,
    "ema_update_": ema_update_,
}
