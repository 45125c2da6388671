"""k-means, which codebooks start from."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import distributed
from fastvq.functional.quantize import unit_norm
from fastvq.ops import accumulate, search

from .candidates import compacted, random_rows, slots, spread_over_ranks


def kmeans(
    x: Tensor, size: int, *, iterations: int, mask: Tensor, metric: str = "l2", together: bool = False
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random rows, by `search` and `accumulate`: no N x K matrix, no host synchronisation.

    Args:
        x: vectors (N, D); unit vectors for metric "dot", whose means are normalised (spherical k-means).
        size: K.
        iterations: rounds of assignment and averaging.
        mask: bool (N,), the rows that take part; False for every row that is not finite.
        metric: "l2" or "dot".
        together: over the rows of all ranks, which must all call this; one all-reduce for the first means and one a
            round. Every rank gets the same bits.

    Returns:
        means (K, D) and how many rows each had in the last round (K,), float32. A mean without rows keeps its place.
        With fewer such rows than K, rows repeat; with none, the means are zero.

    Source: Lloyd, Least Squares Quantization in PCM, 1982; Dhillon and Modha, 2001, for the spherical form.
    """
    seeds = random_rows(x, mask, slots(size, together))
    if together:
        seeds = spread_over_ranks(seeds)
        distributed.sum_(*seeds)
    rows, available = compacted(seeds)
    means = rows[torch.arange(size, device=x.device) % available.clamp(1, len(rows))]
    counts = means.new_zeros(size)
    for _ in range(iterations):
        indices = search(x, means, metric=metric).masked_fill(~mask, -1)
        counts, sums = accumulate(x, indices, size)
        if together:
            distributed.sum_(counts, sums)
        new = sums / counts.clamp_min(1)[:, None]
        if metric == "dot":
            new = unit_norm(new)
        means = torch.where(counts[:, None] > 0, new, means)
    return means, counts
