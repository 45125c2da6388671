"""Initialization of codebooks by k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import distributed
from fastvq.functional.quantize import unit_norm
from fastvq.ops import accumulate, search

from .candidates import compacted, random_rows, slots, spread_over_ranks, spread_seeds

SEEDINGS = ("k-means++", "random")


def kmeans(
    x: Tensor,
    size: int,
    *,
    iterations: int,
    mask: Tensor,
    metric: str = "l2",
    seeding: str = "k-means++",
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm, with `search` and `accumulate`: no N x K matrix.

    Args:
        x: vectors (N, D); unit vectors for metric "dot", whose means are normalized (spherical k-means).
        size: K.
        iterations: number of rounds of assignment and averaging.
        mask: bool (N,), the rows that take part; False for every row that is not finite.
        metric: "l2" or "dot".
        seeding: the first means: rows far from each other, "k-means++" (`candidates.spread_seeds`), or "random" rows.
            With random rows, rows that occur often take many means, of which all but one never get a row.
        together: use the rows of all ranks, which must all call this: one all-reduce a round, and one for random first
            means, or log2 K + 4 for others. Every rank gets the same bits.

    Returns:
        means (K, D) and the number of rows of each in the last round (K,), float32. A mean without rows stays as it is.
        With fewer than K rows in the mask, rows repeat; with none, the means are zero.

    Source: Lloyd, Least Squares Quantization in PCM, 1982; Dhillon and Modha, 2001, for the spherical form.
    """
    means = first_means(x, size, mask=mask, seeding=seeding, together=together)
    counts = means.new_zeros(size)
    for _ in range(iterations):
        indices = search(x, means, metric=metric).masked_fill(~mask, -1)
        counts, sums = accumulate(x, indices, size)
        if together:
            distributed.sum_(counts, sums)
        means = moved_means(means, counts, sums, metric)
    return means, counts


def first_means(x: Tensor, size: int, *, mask: Tensor, seeding: str, together: bool) -> Tensor:
    """Return the means (K, D) float32 that `kmeans` starts from, with its arguments."""
    if seeding == "k-means++":
        seeds = spread_seeds(x, mask, size, together=together)
    else:
        seeds = random_rows(x, mask, slots(size, together))
        if together:
            seeds = spread_over_ranks(seeds)
            distributed.sum_(*seeds)
    rows, available = compacted(seeds)
    return rows[torch.arange(size, device=x.device) % available.clamp(1, min(size, len(rows)))]


def moved_means(means: Tensor, counts: Tensor, sums: Tensor, metric: str) -> Tensor:
    """Return the means (K, D) after a round that has found counts (K,) and sums (K, D)."""
    new = (sums / counts.clamp_min(1)[:, None]).to(means.dtype)
    if metric == "dot":
        new = unit_norm(new)
    # A sum of giant rows may overflow float32: the code then stays at the row that it began with.
    return torch.where((counts > 0)[:, None] & new.isfinite().all(1, keepdim=True), new, means)
