"""Beam search through the stages of a residual quantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .tables import CHUNK_ELEMENTS

Stage = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]]
"""A stage of `beam_search`, which proposes up to k codes for each residual.

(residuals (n, D), totals (n, D), mask (n,) or None, k) -> (indices (n, k), outputs (n, k, D), errors (n, k) float64).
The outputs are subtracted from the residuals.
"""


@torch.no_grad()
def beam_search(
    x: Tensor,
    stages: Sequence[Stage],
    beams: int,
    *,
    weights: Sequence[float] | Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the indices of each vector under residual quantization, found by beam search.

        score = sum_q weights_q mean (r_q - e_q)^2,   r_{q+1} = r_q - e_q

    At each stage every beam proposes its `beams` nearest codes, and the `beams` proposals with the smallest scores
    continue; the smallest final score wins. Equal scores are ordered by beam, then by nearness. One beam is the greedy
    search of `fastvq.residual_search`.

    Args:
        x: vectors (N, D), float32 or float64.
        stages: Q functions, see `Stage`.
        beams: the number of beams.
        weights: (Q,), weights of the stages' errors in the score; 1 by default.
        mask: bool (N,), True for the rows that take part.

    Returns:
        indices (N, Q) int64, -1 for excluded and non-finite rows. The nearest codes are exact; scores are summed in
        float64.

    Source: Babenko and Lempitsky, Additive Quantization for Extreme Vector Compression, 2014 (beam search); Liu et al.,
    Improved Residual Vector Quantization, 2015.
    """
    weights = [1.0] * len(stages) if weights is None else weights
    if beams < 1 or len(weights) != len(stages):
        raise ValueError(f"beams, weights: must be at least 1, and {len(stages)} numbers; got {beams}, {weights}")
    step = max(1, CHUNK_ELEMENTS // (beams * beams * max(1, x.shape[-1])))
    masks = [None] * len(x) if mask is None else mask.split(step)
    found = [_search(rows, own, stages, beams, weights) for rows, own in zip(x.split(step), masks, strict=False)]
    return torch.cat(found) if found else x.new_zeros((0, len(stages)), dtype=torch.int64)


def _search(
    x: Tensor, mask: Tensor | None, stages: Sequence[Stage], beams: int, weights: Sequence[float] | Tensor
) -> Tensor:
    rows, dim = x.shape
    scores = x.new_zeros((rows, 1), dtype=torch.float64)
    residuals, totals = x[:, None], torch.zeros_like(x)[:, None]
    paths = x.new_zeros((rows, 1, 0), dtype=torch.int64)
    for place, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        width = scores.shape[1]
        beam_mask = None if mask is None else mask.repeat_interleave(width)
        indices, codes, errors = stage(residuals.flatten(0, 1), totals.flatten(0, 1), beam_mask, beams)
        # An absent proposal, where there are fewer finite codes than asked for, never wins.
        errors = torch.where(indices < 0, torch.inf, weight * errors).view(rows, width, -1)
        proposals = errors.shape[2]
        ranking = (scores[..., None] + errors).flatten(1).sort(dim=1, stable=True)
        best = min(width * proposals, beams if place + 1 < len(stages) else 1)
        scores, chosen = ranking.values[:, :best], ranking.indices[:, :best]

        parent = chosen // proposals
        codes = _gather_rows(codes.view(rows, -1, dim), chosen)
        last = indices.view(rows, -1, 1).gather(1, chosen[..., None])
        paths = torch.cat([_gather_rows(paths, parent), last], -1)
        residuals, totals = _gather_rows(residuals, parent) - codes, _gather_rows(totals, parent) + codes
    return paths[:, 0]


def _gather_rows(values: Tensor, places: Tensor) -> Tensor:
    """Return values (N, M, ...) at places (N, m): (N, m, ...)."""
    return values.gather(1, places[..., None].expand(*places.shape, values.shape[-1]))
