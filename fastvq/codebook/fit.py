"""Fitting of a codebook to a data set: k-means over many batches, of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq import distributed
from fastvq.functional.quantize import lookup
from fastvq.ops import accumulate, search
from fastvq.precision import widest_dtype

from .kmeans import first_means, moved_means
from .state import Codebook

SAMPLED = 32
"""Rows for each code, over all ranks, among which the first means are drawn."""


class Fitted(NamedTuple):
    """Result of fitting a codebook."""

    errors: Tensor  # (iterations,) float32: mean squared error per element in each round, before its means move
    rows: int  # number of rows of a pass, over all heads and ranks


@torch.no_grad()
def fit_(
    codebook: Codebook,
    batches: Callable[[Tensor | None], Iterable[tuple[Tensor, Tensor | None]]],
    *,
    iterations: int,
) -> Fitted:
    """Set the codes of a codebook to the k-means of all batches, and its averages to those of a typical batch.

    The first pass over the data draws rows for the first means, uniformly, and each iteration is one more. Cluster
    sizes become the mean counts of a batch, so that moving averages go on from there.

    Args:
        batches: a function that starts a pass and yields (x (H, N, D), mask bool (H, N) or None). It gets the means
            (H, K, D) of the pass, on which x may depend, or None in the first one.
        iterations: number of rounds of assignment and averaging.

    With several ranks that learn together, all of them must call this, each with its own batches; the number of batches
    may differ. A round is one all-reduce.

    Raises:
        ValueError: no row is finite and in the mask, in the first pass or in a later one.
    """
    together = codebook.together()
    share = -(-SAMPLED * codebook.size // (distributed.world_size() if together else 1))
    rows, number, steps = _sample(codebook, batches, share)
    totals = torch.tensor([number, steps], dtype=torch.float64, device="cpu").to(codebook.embed_avg)
    if together:
        distributed.sum_(totals)
    number, steps = (round(value) for value in totals.tolist())
    if not number:
        raise ValueError("batches: have no vector that is finite and in the mask")
    steps = max(1, round(steps / (distributed.world_size() if together else 1)))
    means = torch.stack(
        [
            first_means(
                head, codebook.size, mask=head.isfinite().all(1), seeding=codebook.kmeans_seeding, together=together
            )
            for head in rows
        ]
    )
    counts, errors = torch.zeros_like(codebook.cluster_size), []
    for _ in range(iterations):
        counts, sums, error = _round(codebook, means, batches, together)
        if not counts.any():
            raise ValueError("batches: must start anew at each pass, got no vector after the first one")
        means = torch.stack([moved_means(*each, codebook.metric) for each in zip(means, counts, sums, strict=True)])
        errors.append(error / (counts.sum() * codebook.dim).clamp_min(1))
    codebook.set_(means, (counts / steps).clamp_min(1 / steps).float())
    codebook.held_counts = codebook.held_sums = None
    return Fitted(torch.stack(errors).float() if errors else means.new_zeros(0), number)


def _sample(
    codebook: Codebook, batches: Callable[[Tensor | None], Iterable[tuple[Tensor, Tensor | None]]], share: int
) -> tuple[Tensor, int, int]:
    """Return up to `share` rows of one pass (H, S, D), NaN where there are fewer, their number and that of batches."""
    like, number, steps = codebook.embed_avg, torch.zeros((), dtype=torch.int64), 0
    rows, keys = like.new_zeros(codebook.heads, 0, codebook.dim), like.new_zeros(codebook.heads, 0)
    for x, mask in batches(None):
        x, mask = _masked(x.to(like), mask)
        number, steps = number.to(x.device) + mask.sum(), steps + 1
        # The smallest of random keys are a uniform sample, however many rows follow.
        new = torch.rand(mask.shape, device=x.device).masked_fill(~mask, torch.inf)
        keys, rows = torch.cat([keys, new], 1), torch.cat([rows, x.masked_fill(~mask[..., None], torch.nan)], 1)
        keys, kept = keys.topk(min(share, keys.shape[1]), 1, largest=False)
        rows = rows.gather(1, kept[..., None].expand(-1, -1, codebook.dim))
    return rows, int(number), steps


def _round(
    codebook: Codebook,
    means: Tensor,
    batches: Callable[[Tensor | None], Iterable[tuple[Tensor, Tensor | None]]],
    together: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the counts (H, K), the sums (H, K, D) and the squared error () of one pass, over all ranks."""
    wide = widest_dtype(means.device)
    counts, sums = torch.zeros_like(means[..., 0], dtype=wide), torch.zeros_like(means, dtype=wide)
    error = counts.new_zeros(())
    for x, mask in batches(means):
        x, mask = _masked(x.to(means), mask)
        indices = search(x, means, metric=codebook.metric, mask=mask)
        for head, (own, chosen) in enumerate(zip(x, indices, strict=True)):
            count, total = accumulate(own, chosen, codebook.size)
            counts[head] += count
            sums[head] += total
            difference = torch.where((chosen >= 0)[:, None], own - lookup(means[head], chosen), 0)
            error += difference.square().sum(dtype=wide)
    if together:
        distributed.sum_(counts, sums, error)
    return counts, sums, error


def _masked(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    finite = x.isfinite().all(-1)
    return x, finite if mask is None else finite & mask


def refuse_frozen(layers: Iterable[Any]) -> None:
    """Refuse to fit layers of which one is frozen, before any of them changes.

    Raises:
        ValueError: the codebook of a layer is frozen.
    """
    if any(layer.freeze_codebook for layer in layers):
        raise ValueError("freeze_codebook: must be False to fit the codes, got True")


class Passes(NamedTuple):
    """An iterable of batches that starts anew at each pass."""

    start: Callable[[], Iterator[Tensor]]

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        return self.start()


def passes(data: Iterable[Any], inputs: Callable[[Any], Tensor] | None) -> Callable[[], Iterator[Tensor]]:
    """Return a function that starts a pass over the batches of a data set, each mapped by `inputs`.

    Raises:
        TypeError: data can't be iterated, or only once, or a batch is no tensor.
    """
    if not isinstance(data, Iterable):
        raise TypeError(f"batches: must be an iterable of batches, got {type(data).__name__}")
    if iter(data) is data:
        raise TypeError(f"batches: must start anew at each pass, as a list or a DataLoader does, got {type(data)}")

    def start() -> Iterator[Tensor]:
        for batch in data:
            x = batch if inputs is None else inputs(batch)
            if not isinstance(x, Tensor):
                raise TypeError(f"batches: must hold tensors, or inputs must return them, got {type(x)}")
            yield x

    return start
