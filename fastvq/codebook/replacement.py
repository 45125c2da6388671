"""Replacement of dead codes: the policy, and its state for one codebook."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvq.parts.arguments import check_not_negative, check_positive, check_sizes
from fastvq.precision import Unsaved, zero_statistic

from .candidates import (
    Candidates,
    Reservoir,
    compacted,
    nearest_rows,
    random_rows,
    slots,
    spread_over_ranks,
    spread_rows,
)


@dataclass(frozen=True)
class Replacement:
    """Policy for dead codes, which are replaced by vectors.

    A code is dead if its moving cluster size N_k is below `threshold`. The new one begins with the cluster size `size`
    and the average of one vector that occurs that often. If `relative`, both numbers are multiples of the mean cluster
    size sum_k N_k / K.

        Replacement(0.1, relative=True, size=1.0, every=5, before_update=True)    Mimi
        Replacement(1.0, keep_averages=True)                                      Jukebox
        Replacement(anchors=True, rows="nearest")                                 CVQ-VAE, its "closest" anchors

    Args:
        threshold: limit of the cluster size; 0 for no replacement. threshold_ema_dead_code of vector_quantize_pytorch
            is absolute, Mimi's 0.1 relative.
        relative: see above.
        every: the number of learning steps between replacements.
        rows: "random" vectors; "kmeans++": vectors drawn one after another by their squared distance from the codes;
            "nearest", for anchors: to each code the vector nearest to it. Of several ranks each gives those of its
            share of the codes.
        reservoir: number of recent vectors to draw from; 0 to draw from the batch.
        at_once: the largest number of codes that a step replaces; by default K, or 32 with "kmeans++".
        size: initial cluster size of a new code; by default the limit below which a code is dead. With a larger one,
            such as the mean cluster size (1.0 if `relative`), it isn't dead again soon.
        before_update: replace the codes that were dead before this step, and then move the averages, which pull the new
            codes towards the vectors of those before; by default the averages move first.
        keep_averages: replace the codes alone. Cluster sizes and averages stay, so that a new code is replaced again
            unless it gets enough vectors, and then is mixed with the average that was there.
        anchors: move every code towards a vector, its anchor, instead of replacing dead ones: the less it is used, the
            farther. With the share p_k = N_k / sum_k N_k and the decay of the codebook,
            e_k <- (1 - a_k) e_k + a_k anchor_k,   a_k = exp(-10 K p_k / (1 - decay) - 1e-3).
            Cluster sizes stay, so that a code needs vectors of its own to come to rest. The threshold has no effect,
            and every, relative, size, at_once, before_update and keep_averages stay as they are.

    Raises:
        ValueError: a value is invalid; the message names it.

    Source: Dhariwal et al., Jukebox, 2020, section 3.1 (random restarts); Defossez et al., Moshi, 2024 (relative
    threshold, every 5 steps); for sizes, averages and order, their code; Arthur and Vassilvitskii 2007 (k-means++);
    Zheng and Vedaldi, Online Clustered Codebook (CVQ-VAE), 2023 (anchors; the formula is that of their code).
    """

    threshold: float = 2.0
    relative: bool = False
    every: int = 1
    rows: str = "random"
    reservoir: int = 0
    at_once: int | None = None
    size: float | None = None
    before_update: bool = False
    keep_averages: bool = False
    anchors: bool = False

    def __post_init__(self) -> None:
        check_not_negative(threshold=self.threshold, reservoir=self.reservoir)
        check_sizes(every=self.every)
        if self.rows not in ("random", "kmeans++", "nearest"):
            raise ValueError(f"rows: must be 'random', 'kmeans++' or 'nearest', got {self.rows!r}")
        if self.rows == "nearest" and not self.anchors:
            raise ValueError("rows: must be 'random' or 'kmeans++' without anchors=True, got 'nearest'")
        if self.at_once is not None:
            check_sizes(at_once=self.at_once)
        if self.size is not None:
            check_positive(size=self.size)
        if self.keep_averages and (self.before_update or self.size is not None):
            name = "before_update" if self.before_update else "size"
            raise ValueError(f"keep_averages: must be False beside {name}: the averages would undo the replacement")
        if self.anchors and (self.keep_averages or self.at_once is not None):
            name = "keep_averages" if self.keep_averages else "at_once"
            raise ValueError(f"anchors: must be False beside {name}: all codes and their averages move")
        if self.anchors and (self.before_update or self.every > 1):
            name = "before_update" if self.before_update else "every"
            raise ValueError(f"anchors: must be False beside {name}: the averages would undo the moves")
        if self.anchors and (self.relative or self.size is not None):
            name = "relative" if self.relative else "size"
            raise ValueError(f"anchors: must be False beside {name}: no code counts as dead")

    def most(self, size: int) -> int:
        """Return the largest number of K codes that one step may replace."""
        return min(size, self.at_once or (32 if self.rows == "kmeans++" and not self.anchors else size))


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
        if self.policy.rows == "nearest":
            return nearest_rows(x, mask, codes, metric, together=together)
        count = slots(self.policy.most(self.size), together)
        if self.policy.rows == "random":
            found = random_rows(x, mask, count)
        else:
            found = spread_rows(x, mask, codes, count, metric)
        return spread_over_ranks(found) if together else found

    @torch.no_grad()
    def move_to_anchors_(
        self, codes: Tensor, cluster_size: Tensor, embed_avg: Tensor, found: Candidates, decay: float | Tensor
    ) -> None:
        """Move codes (K, D) towards the rows found; random ones repeat where they are fewer than codes."""
        if self.policy.rows == "nearest":
            rows, given = found[0], found[1] > 0
        else:
            rows, available = compacted(found)
            rows = rows[torch.arange(self.size, device=rows.device) % available.clamp(1, len(rows))]
            given = (available > 0).expand(self.size)
        share = cluster_size / cluster_size.sum().clamp_min(torch.finfo(cluster_size.dtype).tiny)
        rest = (torch.zeros_like(share) + (1 - decay)).clamp_min(torch.finfo(share.dtype).tiny)
        weight = torch.exp(-10 * self.size * share / rest - 1e-3) * given
        codes.copy_(torch.where(codes.isfinite().all(1, keepdim=True), codes, 0))
        moved = weight[:, None] * (torch.where(given[:, None], rows, 0) - codes)
        codes.add_(moved)
        embed_avg.add_(moved * cluster_size[:, None])

    @torch.no_grad()
    def replace_(self, codes: Tensor, cluster_size: Tensor, embed_avg: Tensor, found: Candidates) -> None:
        """Replace dead codes of (K, D) by the rows found, in ascending order, until the rows are used up."""
        # Sums, because `full_like` would be compiled anew for a changing number.
        unit = cluster_size.mean() if self.policy.relative else torch.ones_like(cluster_size[0])
        limit = (torch.zeros_like(unit) + self.policy.threshold) * unit
        dead = cluster_size < limit
        if self.policy.every > 1:
            dead = dead & (self.steps % self.policy.every == 0)
        rows, available = compacted(found)
        rank = dead.cumsum(0) - 1
        dead = dead & (rank < available)
        new = rows[rank.clamp(0, len(rows) - 1)]
        codes.copy_(torch.where(dead[:, None], new, codes))
        if self.policy.keep_averages:
            return
        size = limit if self.policy.size is None else (torch.zeros_like(unit) + self.policy.size) * unit
        cluster_size.copy_(torch.where(dead, size, cluster_size))
        embed_avg.copy_(torch.where(dead[:, None], new * size, embed_avg))
