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
    share = torch.full_like(cluster_size, 1 - decay)
    if weight is not None:
        share = share * weight
    _move_(cluster_size, counts, share)
    _move_(embed_avg, sums, share[:, None])
    total = cluster_size.sum(dtype=torch.float64)
    smoothed = ((cluster_size + eps) / (total + len(cluster_size) * eps) * total).float()[:, None]
    codebook.copy_(torch.where(smoothed > 0, embed_avg / smoothed, codebook))


def _move_(average: Tensor, new: Tensor, share: Tensor) -> None:
    """Interpolate in place: as `lerp_`, but also where the difference of opposite numbers overflows."""
    moved = average.lerp(new, share)
    average.copy_(torch.where((new - average).isfinite(), moved, average * (1 - share) + new * share))
