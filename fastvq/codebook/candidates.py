"""Rows that codes may be set to: drawn from the batch or from a reservoir of recent rows, by all ranks together.

Candidates are (rows (S, D) float32, filled (S,) float32): slots with filled = 1 hold a row, the others zeros. The
number of slots never depends on data, so that nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastvq import distributed
from fastvq.functional.quantize import lookup
from fastvq.ops import min_distance_, search
from fastvq.precision import Unsaved, zero_statistic

Candidates = tuple[Tensor, Tensor]


def slots(count: int, together: bool) -> int:
    """Return the number of slots that each rank fills, so that all ranks have `count` of them together."""
    return math.ceil(count / distributed.world_size()) if together else count


def random_rows(x: Tensor, mask: Tensor, count: int) -> Candidates:
    """Draw up to `count` distinct random rows of x (N, D) in the mask (N,)."""
    taken = min(count, len(x))
    keys = torch.rand(len(x), device=x.device).masked_fill_(~mask, 2.0)
    chosen = keys.topk(taken, largest=False, sorted=True).indices
    return _padded(x[chosen], mask[chosen], count)


def spread_rows(x: Tensor, mask: Tensor, codes: Tensor, count: int, metric: str) -> Candidates:
    """Draw up to `count` rows of x (N, D) that are far from the codes (K, D) and from each other.

    Each is drawn with a probability proportional to its squared distance to the nearest code or row drawn before. Each
    of several ranks draws its share from its own rows, so the rows of two ranks may be near each other. Distances whose
    squares overflow float32 count as equal.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, with given first centers.
    """
    taken = min(count, len(x))
    # A row with distance zero is never drawn, because ln 0 = -inf.
    distances = (x.float() - lookup(codes.float(), search(x, codes, metric=metric))).square().sum(1)
    distances = torch.where(mask, distances, 0)
    chosen, filled = [], []
    for _ in range(taken):
        # The argmax of ln w + Gumbel noise is each row with a probability proportional to w.
        noise = -torch.empty_like(distances).exponential_().log()
        # keepdim, because the host would read an index without an axis.
        pick = (distances.log() + noise).argmax(keepdim=True)
        chosen.append(pick)
        filled.append(distances[pick] > 0)
        min_distance_(distances, x, x[pick])
    if not taken:
        return _padded(x, mask, count)
    return _padded(x[torch.cat(chosen)], torch.cat(filled), count)


def _padded(rows: Tensor, filled: Tensor, count: int) -> Candidates:
    rows = torch.where(filled[:, None], rows.float(), 0)
    missing = count - len(rows)
    return nn.functional.pad(rows, (0, 0, 0, missing)), nn.functional.pad(filled.float(), (0, missing))


def spread_over_ranks(candidates: Candidates) -> Candidates:
    """Return the candidates in this rank's slots of a larger, otherwise empty table.

    The sum of these tables over the ranks holds the candidates of all ranks, interleaved.
    """
    rows, filled = candidates
    ranks, own = distributed.world_size(), distributed.rank()
    all_rows, all_filled = rows.new_zeros(len(rows), ranks, rows.shape[1]), filled.new_zeros(len(rows), ranks)
    all_rows[:, own], all_filled[:, own] = rows, filled
    return all_rows.flatten(0, 1), all_filled.flatten()


def compacted(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Return the rows with the filled slots first, in their order, and the number () of filled slots."""
    rows, filled = candidates
    order = torch.argsort(filled, descending=True, stable=True)
    return rows[order], filled.sum().long()


class Reservoir(Unsaved, nn.Module):
    """Memory of the last `size` rows drawn for it, for batches that are too small or too uniform.

    It is not saved.

    State: rows (R, D) float32; filled (R,) bool; position () int64, where the next row goes.
    """

    _statistics = ("rows", "filled", "position")

    rows: Tensor
    filled: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.rows = zero_statistic(size, dim)
        self.filled = zero_statistic(size, dtype=torch.bool)
        self.position = zero_statistic(dtype=torch.int64)

    @torch.no_grad()
    def add_(self, x: Tensor, mask: Tensor) -> None:
        """Add random rows of x (N, D) in the mask (N,), up to a quarter of the size."""
        self.follow_(x.device)
        size = len(self.rows)
        rows, filled = random_rows(x, mask, min(max(1, size // 4), len(x)))
        places = (self.position + torch.arange(len(rows), device=rows.device)) % size
        taken = filled > 0
        self.rows[places] = torch.where(taken[:, None], rows, self.rows[places])
        self.filled[places] = self.filled[places] | taken
        self.position.copy_((self.position + taken.sum()) % size)
