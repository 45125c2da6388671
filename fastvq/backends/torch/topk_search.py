"""The op `topk_search` in torch operations.

The certificate is that of `search`, with the k-th smallest score in place of the smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import widen

from . import search


def topk_search(x: Tensor, codebook: Tensor, k: int, *, metric: str = "l2") -> Tensor:
    """Implement `fastvq.topk_search`."""
    indices = x.new_full((*x.shape[:-1], k), -1, dtype=torch.int64)
    if x.dim() == 3:
        for xh, eh, out in zip(x, codebook, indices, strict=True):
            out.copy_(topk_search(xh, eh, k, metric=metric))
        return indices
    frame = search.make_frame(codebook, metric)
    rows = max(1, search.tile_elements(x.device) // max(min(len(codebook), search.TILE_CODES), 8 * k))
    for part, out in zip(x.split(rows), indices.split(rows), strict=True):
        _topk_rows(part, frame, metric, out)
    return indices


def _topk_rows(x: Tensor, frame: search.ScaledCodebook, metric: str, out: Tensor) -> None:
    wide = widen(x)
    finite = (wide * 0).sum(1) == 0
    wide = wide.masked_fill(~finite[:, None], 0)
    near, bound = frame.rows(wide)
    candidates = search.find_candidates(near, bound, finite, frame, out.shape[1])
    if candidates is None:
        for part, part_out in zip(x.tensor_split(2), out.tensor_split(2), strict=True):
            _topk_rows(part, frame, metric, part_out)
        return
    row, code = candidates
    scores = search.scores_by_definition(wide, row, frame.exact, code, metric)
    write_ranked(row, code, scores, out)


def write_ranked(row: Tensor, code: Tensor, scores: Tensor, out: Tensor) -> None:
    """Write to out [n, k] the k codes of each row with the lowest scores, in order, ties by ascending code."""
    order = code.argsort(stable=True)
    order = order[scores[order].argsort(stable=True)]
    order = order[row[order].argsort(stable=True)]
    row, code = row[order], code[order]
    counts = torch.bincount(row, minlength=len(out))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    held = place < out.shape[1]
    out[row[held], place[held]] = code[held]
