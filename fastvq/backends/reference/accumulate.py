"""What a codebook learns from, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .search import CHUNK_ELEMENTS


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
