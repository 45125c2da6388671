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
) -> None:
    """Implement `fastvq.ema_update_`."""
    cluster_size.copy_(decay * cluster_size.double() + (1 - decay) * counts.double())
    embed_avg.copy_(decay * embed_avg.double() + (1 - decay) * sums.double())
    size = cluster_size.double()
    total = size.sum()
    smoothed = ((size + eps) / (total + len(size) * eps) * total).float()[:, None]
    codebook.copy_(torch.where(smoothed > 0, embed_avg.double() / smoothed, codebook))
