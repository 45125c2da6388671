"""The op `search` by definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import chunk_rows, widen


def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Implement `fastvq.search`."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if x.dim() == 3:
        for xh, eh, out in zip(x, codebook, indices, strict=True):
            out.copy_(search(xh, eh, metric=metric))
        return indices
    rows = chunk_rows(codebook.shape[0])
    for chunk, out in zip(x.split(rows), indices.split(rows), strict=True):
        out.copy_(_search_rows(widen(chunk), widen(codebook), metric))
    return indices


def scores_by_definition(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Return the score of each pair [n, K], the smaller the nearer, for float64 x [n, D] and codebook [K, D].

    docs/exactness.md defines it in the section "The definition".
    """
    scores = x.new_zeros(x.shape[0], codebook.shape[0])
    for x_j, e_j in zip(x.unbind(1), codebook.unbind(1), strict=True):
        if metric == "l2":
            difference = x_j[:, None] - e_j[None, :]
            scores += difference * difference
        else:
            scores -= x_j[:, None] * e_j[None, :]
    # Only finite float64 input beyond 1e154 overflows to a NaN, which counts as infinitely far.
    return scores.masked_fill(scores.isnan(), torch.inf)


def _search_rows(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    size = codebook.shape[0]
    scores = scores_by_definition(x, codebook, metric)
    usable = codebook.isfinite().all(1)
    smallest = scores.masked_fill(~usable, torch.inf).amin(1, keepdim=True)
    ties = (scores == smallest) & usable
    lowest = torch.where(ties, torch.arange(size, device=x.device), size).amin(1)
    answered = x.isfinite().all(1) & (lowest < size)
    return torch.where(answered, lowest, -1)
