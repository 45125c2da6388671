"""The op `ema_update_` by definition, in float64; the state is rounded to float32 where it is written."""

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
    """Implement `fastvq.ema_update_`."""
    share = torch.full_like(cluster_size, 1 - decay, dtype=torch.float64)
    if weight is not None:
        share = share * weight
    kept = 1 - share
    cluster_size.copy_(kept * cluster_size.double() + share * counts.double())
    embed_avg.copy_(kept[:, None] * embed_avg.double() + share[:, None] * sums.double())
    size = cluster_size.double()
    total = size.sum()
    smoothed = ((size + eps) / (total + len(size) * eps) * total).float()[:, None]
    codebook.copy_(torch.where(smoothed > 0, embed_avg.double() / smoothed, codebook))
