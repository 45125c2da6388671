"""The op `ema_update_` in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    weight: Tensor | None = None,
) -> None:
    """Implement `fastvq.ema_update_`: the averages in float32, the total and the smoothing in float64."""
    if weight is None:
        cluster_size.lerp_(counts, 1 - decay)
        embed_avg.lerp_(sums, 1 - decay)
    else:
        shares = weight * (1 - decay)
        cluster_size.lerp_(counts, shares)
        embed_avg.lerp_(sums, shares[:, None])
    total = cluster_size.sum(dtype=torch.float64)
    smoothed = ((cluster_size + eps) / (total + len(cluster_size) * eps) * total).float()[:, None]
    codebook.copy_(torch.where(smoothed > 0, embed_avg / smoothed, codebook))
