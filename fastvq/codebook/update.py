"""Tensor functions of a learning step: the statistics of a batch, and the moving averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq.ops import accumulate, ema_update_
from fastvq.precision import widest_dtype


def batch_statistics(
    x: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor], shapes: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the counts (H, K) and sums (H, K, D) of each codebook, from one pass over the rows of all codebooks.

    Args:
        x: vectors, a tensor (Q, H, N, D) or Q tensors (H, N, D).
        indices: (Q, H, N) or Q tensors (H, N) int64; rows with -1 are excluded.
        shapes: (H, K) of each of the Q codebooks.
    """
    if isinstance(x, Tensor):
        rows = x.flatten(0, -2)
    else:
        rows = x[0].flatten(0, 1) if len(x) == 1 else torch.cat([one.flatten(0, 1) for one in x])
    sizes = [heads * size for heads, size in shapes]
    counts, sums = accumulate(rows, flat_indices(indices, shapes), sum(sizes))
    if len(set(shapes)) == 1:
        stacked = (len(shapes), *shapes[0])
        return list(counts.view(stacked).unbind()), list(sums.view(*stacked, -1).unbind())
    parts = list(zip(shapes, counts.split(sizes), sums.split(sizes), strict=True))
    return [count.view(shape) for shape, count, _ in parts], [total.view(*shape, -1) for shape, _, total in parts]


def flat_indices(indices: Tensor | Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Return the flat indices of all codebooks in the concatenation of their heads; -1 stays.

    Args:
        indices: (Q, H, N) or Q tensors (H, N) int64.
        shapes: (H, K) of each of the Q codebooks.
    """
    if len(shapes) == shapes[0][0] == 1:
        return indices[0].flatten()
    if isinstance(indices, Tensor) and len(set(shapes)) == 1:
        heads = indices.flatten(0, 1)
        size = shapes[0][1]
        starts = torch.arange(0, len(heads) * size, size, device=heads.device)
        return torch.where(heads < 0, -1, heads + starts[:, None]).flatten()
    start, shifted = 0, []
    for one, (heads_count, size) in zip(indices, shapes, strict=True):
        stop = start + heads_count * size
        starts = torch.arange(start, stop, size, device=one.device)
        shifted.append(torch.where(one < 0, -1, one + starts[:, None]).flatten())
        start = stop
    return torch.cat(shifted)


def ema_step_(
    codes: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    weight: Tensor | None = None,
    *,
    decay: float | Tensor,
    eps: float | Tensor,
) -> None:
    """Apply `fastvq.ema_update_` to each head: codes, embed_avg and sums (H, K, D), the others (H, K)."""
    if isinstance(decay, Tensor):  # the op would read it, and wait for the device
        step = torch.ones_like(cluster_size) if weight is None else weight
        weight, decay = (step.to(widest_dtype(step.device)) * (1 - decay)).float(), 0.0
    for head in range(len(codes)):
        ema_update_(
            codes[head],
            cluster_size[head],
            embed_avg[head],
            counts[head],
            sums[head],
            decay=decay,
            eps=eps,
            weight=None if weight is None else weight[head],
        )
