"""Replacement of dead codes: the policy, and its state for one codebook."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvq.precision import Unsaved, zero_statistic

from .candidates import Candidates, Reservoir, compacted, random_rows, slots, spread_over_ranks, spread_rows


@dataclass(frozen=True)
class Replacement:
    """Policy for dead codes, which are replaced by vectors.

    A code is dead if its moving cluster size N_k is below `threshold`, or, if `relative`, below `threshold` times the
    mean cluster size sum_k N_k / K.

    Args:
        threshold: limit of the cluster size; 0 for no replacement. threshold_ema_dead_code of vector_quantize_pytorch
            is absolute, Mimi's 0.1 relative.
        relative: see above.
        every: the number of learning steps between replacements.
        rows: "random" vectors, or "kmeans++": vectors drawn one after another by their squared distance from the codes.
        reservoir: number of recent vectors to draw from; 0 to draw from the batch.
        at_once: the largest number of codes that a step replaces; by default K with random rows, 32 with "kmeans++".
        size: initial cluster size of a new code; by default the limit below which a code is dead.

    Raises:
        ValueError: a value is invalid; the message names it.

    Source: Dhariwal et al., Jukebox, 2020, section 3.1 (random restarts); Defossez et al., Moshi, 2024 (relative
    threshold, every 5 steps); Arthur and Vassilvitskii 2007 (k-means++).
    """

    threshold: float = 2.0
    relative: bool = False
    every: int = 1
    rows: str = "random"
    reservoir: int = 0
    at_once: int | None = None
    size: float | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: must not be negative, got {self.threshold}")
        if not self.every >= 1:
            raise ValueError(f"every: must be at least 1, got {self.every}")
        if self.rows not in ("random", "kmeans++"):
            raise ValueError(f"rows: must be 'random' or 'kmeans++', got {self.rows!r}")
        if not self.reservoir >= 0:
            raise ValueError(f"reservoir: must not be negative, got {self.reservoir}")
        if self.at_once is not None and not self.at_once >= 1:
            raise ValueError(f"at_once: must be at least 1, got {self.at_once}")
        if self.size is not None and not self.size > 0:
            raise ValueError(f"size: must be positive, got {self.size}")

    def most(self, size: int) -> int:
        """Return the largest number of K codes that one step may replace."""
        return min(size, self.at_once or (size if self.rows == "random" else 32))


class Replacer(Unsaved, nn.Module):
    """State of a `Replacement` policy for one codebook, which is not saved."""

    _statistics = ("steps",)

    steps: Tensor

    def __init__(self, policy: Replacement, size: int, dim: int, heads: int) -> None:
        super().__init__()
        self.policy, self.size = policy, size
        self.reservoirs = nn.ModuleList(
            [Reservoir(policy.reservoir, dim) for _ in range(heads if policy.reservoir else 0)]
        )
        self.steps = zero_statistic(dtype=torch.int64)

    def reset_(self) -> None:
        """Return to the state of a new replacer."""
        self.steps.zero_()
        for reservoir in self.reservoirs:
            for name in Reservoir._statistics:
                getattr(reservoir, name).zero_()

    def candidates(
        self, x: Tensor, mask: Tensor, codes: Tensor, *, head: int, metric: str, together: bool
    ) -> Candidates:
        """Return rows of x (N, D) in the mask (N,) that may replace codes (K, D); over ranks, a table to be summed."""
        if self.reservoirs:
            reservoir = self.reservoirs[head]
            assert isinstance(reservoir, Reservoir)
            reservoir.add_(x, mask)
            x, mask = reservoir.rows, reservoir.filled
        count = slots(self.policy.most(self.size), together)
        if self.policy.rows == "random":
            found = random_rows(x, mask, count)
        else:
            found = spread_rows(x, mask, codes, count, metric)
        return spread_over_ranks(found) if together else found

    @torch.no_grad()
    def replace_(self, codes: Tensor, cluster_size: Tensor, embed_avg: Tensor, found: Candidates) -> None:
        """Replace dead codes of (K, D) by the rows found, in ascending order, until the rows are used up."""
        # A sum, because `full_like` would be compiled anew for a changing threshold.
        limit = torch.zeros_like(cluster_size[0]) + self.policy.threshold
        if self.policy.relative:
            limit = limit * cluster_size.mean()
        dead = cluster_size < limit
        if self.policy.every > 1:
            dead = dead & (self.steps % self.policy.every == 0)
        rows, available = compacted(found)
        rank = dead.cumsum(0) - 1
        dead = dead & (rank < available)
        new = rows[rank.clamp(0, len(rows) - 1)]
        size = limit if self.policy.size is None else torch.zeros_like(limit) + self.policy.size
        codes.copy_(torch.where(dead[:, None], new, codes))
        cluster_size.copy_(torch.where(dead, size, cluster_size))
        embed_avg.copy_(torch.where(dead[:, None], new * size, embed_avg))
