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
from fastvq.precision import Unsaved, widest_dtype, zero_statistic

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
    of several ranks draws its share from its own rows, so the rows of two ranks may be near each other.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, with given first centers.
    """
    taken = min(count, len(x))
    # A row with distance zero is never drawn, because ln 0 = -inf.
    wide = widest_dtype(x.device)  # holds the squares of all float32 numbers
    exact = (x.to(wide) - lookup(codes.to(wide), search(x, codes, metric=metric))).square().sum(1)
    exact = torch.where(mask, exact, 0)
    # A power of two, so that nothing is rounded, brings the largest distance near 1: float32 then holds the others.
    largest = exact.amax() if len(x) else exact.new_zeros(())
    scale = torch.where(largest > 0, torch.exp2(-torch.floor(torch.log2(largest) / 2)), 1)
    near, distances = (x.to(wide) * scale).float(), (exact * scale * scale).float()
    chosen, filled = [], []
    for _ in range(taken):
        # The argmax of ln w + Gumbel noise is each row with a probability proportional to w.
        noise = -torch.empty_like(distances).exponential_().log()
        # keepdim, because the host would read an index without an axis.
        pick = (distances.log() + noise).argmax(keepdim=True)
        chosen.append(pick)
        filled.append(distances[pick] > 0)
        min_distance_(distances, near, near[pick])
    if not taken:
        return _padded(x, mask, count)
    return _padded(x[torch.cat(chosen)], torch.cat(filled), count)


def nearest_rows(x: Tensor, mask: Tensor, codes: Tensor, metric: str, *, together: bool) -> Candidates:
    """Return, for each of the codes (K, D), the row of x (N, D) in the mask (N,) that is nearest to it.

    Of several ranks that learn together each fills the slots of every R-th code: their sum has all of them.
    """
    if not len(x):
        return _padded(x, mask, len(codes))
    finite = codes.nan_to_num(0, 0, 0)  # a broken code gets an anchor as well
    found = search(finite, torch.where(mask[:, None], x, torch.nan).to(codes.dtype), metric=metric)
    filled = found >= 0
    if together:
        ranks = torch.arange(len(codes), device=codes.device) % distributed.world_size()
        filled = filled & (ranks == distributed.rank())
    return _padded(x[found.clamp_min(0)], filled, len(codes))


SPARE_ROUNDS = 3
"""Rounds of `spread_seeds` that take the place of rows drawn twice; made even if none was, to read nothing back."""


def spread_seeds(x: Tensor, mask: Tensor, size: int, *, together: bool) -> Candidates:
    """Draw `size` rows of x (N, D) in the mask (N,) that are far from each other, or all distinct rows if fewer.

    The first is random, the others are drawn with a probability proportional to the squared distance to the nearest row
    drawn before, in rounds that double their number: 1, 1, 2, 4 ... and then in `SPARE_ROUNDS` of `size` rows each. A
    round is one search, so that all of them cost about as much as five searches of `size` codes. Nothing is read back:
    no round waits for the device. With `together` each rank draws its share of a round from its own rows, and all ranks
    get the same rows, from one all-reduce a round.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007; Bahmani et al., Scalable
    K-Means++, 2012, section 3.3, for drawing several rows a round.
    """
    wide = widest_dtype(x.device)  # holds the squares of all float32 numbers
    distances = torch.where(mask, torch.inf, 0.0).to(wide)
    rounds = [1]
    while sum(rounds) < size:
        rounds.append(min(sum(rounds), size - sum(rounds)))
    rows, filled = _padded(x[:0], mask[:0], 0)
    for place, count in enumerate(rounds + [size] * SPARE_ROUNDS):
        share = slots(count, together)
        found = _drawn_rows(x, distances, share) if place else random_rows(x, mask, share)
        if together:
            found = spread_over_ranks(found)
            distributed.sum_(*found)
        drawn, taken = found
        # The first of equal rows is the nearest to each of them; a code that is NaN is near to none.
        first = search(drawn, torch.where(taken[:, None] > 0, drawn, torch.nan))
        taken = taken * (first == torch.arange(len(first), device=first.device))
        nearest = search(x, torch.where(taken[:, None] > 0, drawn, torch.nan))
        # In place: the float64 differences are the largest tensor here.
        square = x.to(wide, copy=True).sub_(lookup(drawn, nearest)).square_().sum(1)
        distances = torch.where(nearest < 0, distances, torch.minimum(distances, square))
        rows, filled = torch.cat([rows, drawn]), torch.cat([filled, taken])
        kept = torch.argsort(filled, descending=True, stable=True)[:size]
        rows, filled = rows[kept], filled[kept]
    return rows, filled


def _drawn_rows(x: Tensor, distances: Tensor, count: int) -> Candidates:
    """Draw up to `count` rows of x (N, D) with probabilities proportional to the distances (N,), none of them zero."""
    taken = min(count, len(x))
    noise = -torch.empty_like(distances).exponential_().log()
    chosen = (distances.log() + noise).topk(taken).indices
    return _padded(x[chosen], distances[chosen] > 0, count)


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
