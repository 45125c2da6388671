"""The op `accumulate` in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range

from . import search


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """`fastvq.accumulate`: float64 sums over the rows in ascending order, rounded to float32 once."""
    check_index_range(indices, codebook_size)
    # Row `codebook_size` takes what is skipped.
    counts = x.new_zeros(codebook_size + 1, dtype=torch.float64)
    sums = x.new_zeros(codebook_size + 1, x.shape[1], dtype=torch.float64)
    rows = max(1, search.tile_elements(x.device) // max(1, x.shape[1]))
    for chunk, index in zip(x.split(rows), indices.split(rows), strict=True):
        slot = torch.where(index < 0, codebook_size, index)
        counts.index_add_(0, slot, counts.new_ones(slot.shape))
        sums.index_add_(0, slot, chunk.double())
    return counts[:-1].float(), sums[:-1].float()
