"""The op `topk_search` by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import chunk_rows, widen

from .search import scores_by_definition


def topk_search(x: Tensor, codebook: Tensor, k: int, *, metric: str = "l2") -> Tensor:
    """Implement `fastvq.topk_search`."""
    indices = x.new_empty((*x.shape[:-1], k), dtype=torch.int64)
    if x.dim() == 3:
        for xh, eh, out in zip(x, codebook, indices, strict=True):
            out.copy_(topk_search(xh, eh, k, metric=metric))
        return indices
    usable = codebook.isfinite().all(1)
    rows = chunk_rows(codebook.shape[0])
    for chunk, out in zip(x.split(rows), indices.split(rows), strict=True):
        wide = widen(chunk)
        by_score = scores_by_definition(wide, widen(codebook), metric).argsort(dim=1, stable=True)
        usable_first = by_score.gather(1, (~usable)[by_score].byte().argsort(dim=1, stable=True))[:, :k]
        answered = wide.isfinite().all(1)[:, None] & usable[usable_first]
        out.copy_(torch.where(answered, usable_first, -1))
    return indices
