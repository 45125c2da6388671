"""Beam search through the levels of a residual quantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Level = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]]
"""A level of `beam_search`: (residuals (n, D), totals (n, D), mask (n,) or None, k) -> (indices (n, k), codes (n, k, D)
and the inputs (n, D) that these are compared with). It may propose fewer than k codes."""

CHUNK_ELEMENTS = 1 << 22
"""Elements of the largest temporary: 16 MiB of float32."""


@torch.no_grad()
def beam_search(
    x: Tensor,
    levels: Sequence[Level],
    beams: int,
    *,
    weights: Sequence[float] | Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The codes of each vector under residual quantization, with the best few ways kept open at every level.

        score = sum_q weights_q mean (r_q - e_q)^2,   r_{q+1} = r_q - e_q

    Every way that is open proposes its `beams` nearest codes; of all that are proposed the `beams` with the smallest
    score go on, and the smallest at the end wins; equal scores in the order of the ways, and then of nearness. One beam
    is the greedy search of `fastvq.residual_search`.

    Args:
        x: vectors (N, D), float32 or float64.
        levels: Q functions, see `Level`.
        beams: how many ways are kept open.
        weights: (Q,), of the levels' errors in the score; 1 by default.
        mask: bool (N,), True for the rows that count.

    Returns:
        indices (N, Q) int64, -1 for a row that isn't finite or doesn't count. The codes proposed are exact, and scores
        are summed in float64.

    Source: Babenko and Lempitsky, Additive Quantization for Extreme Vector Compression, 2014 (beam search); Liu et al.,
    Improved Residual Vector Quantization, 2015.
    """
    weights = [1.0] * len(levels) if weights is None else weights
    if beams < 1 or len(weights) != len(levels):
        raise ValueError(f"beams, weights: must be at least 1, and {len(levels)} numbers; got {beams}, {weights}")
    step = max(1, CHUNK_ELEMENTS // (beams * beams * max(1, x.shape[-1])))
    masks = [None] * len(x) if mask is None else mask.split(step)
    found = [_search(part, kept, levels, beams, weights) for part, kept in zip(x.split(step), masks, strict=False)]
    return torch.cat(found) if found else x.new_zeros((0, len(levels)), dtype=torch.int64)


def _search(
    x: Tensor, mask: Tensor | None, levels: Sequence[Level], beams: int, weights: Sequence[float] | Tensor
) -> Tensor:
    rows, dim = x.shape
    scores = x.new_zeros((rows, 1), dtype=torch.float64)
    residuals, totals = x[:, None], torch.zeros_like(x)[:, None]
    ways = x.new_zeros((rows, 1, 0), dtype=torch.int64)
    for place, (level, weight) in enumerate(zip(levels, weights, strict=True)):
        open_ways = scores.shape[1]
        counted = None if mask is None else mask.repeat_interleave(open_ways)
        indices, codes, inputs = level(residuals.flatten(0, 1), totals.flatten(0, 1), counted, beams)
        errors = (inputs[:, None].double() - codes.double()).square().mean(-1)
        # A proposal that isn't there, beyond the finite codes, never wins.
        errors = torch.where(indices < 0, torch.inf, weight * errors).view(rows, open_ways, -1)
        offered = errors.shape[2]
        ranking = (scores[..., None] + errors).flatten(1).sort(dim=1, stable=True)
        kept = min(open_ways * offered, beams if place + 1 < len(levels) else 1)
        scores, chosen = ranking.values[:, :kept], ranking.indices[:, :kept]

        parent = chosen // offered

        def of(tensor: Tensor, place: Tensor) -> Tensor:
            return tensor.gather(1, place[..., None].expand(*place.shape, tensor.shape[-1]))

        codes = of(codes.view(rows, -1, dim), chosen)
        ways = torch.cat([of(ways, parent), indices.view(rows, -1, 1).gather(1, chosen[..., None])], -1)
        residuals, totals = of(residuals, parent) - codes, of(totals, parent) + codes
    return ways[:, 0]
