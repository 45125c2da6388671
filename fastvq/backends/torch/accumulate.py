"""The op `accumulate` in torch operations: `index_add_` in float64, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range

from . import search


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Implement `fastvq.accumulate`."""
    check_index_range(indices, codebook_size)
    # Excluded rows are added to one more slot, which is dropped: to select the others would wait for the device.
    slots = torch.where(indices < 0, codebook_size, indices)
    counts = x.new_zeros(codebook_size + 1, dtype=torch.float64)
    sums = x.new_zeros(codebook_size + 1, x.shape[1], dtype=torch.float64)
    counts.index_add_(0, slots, counts.new_ones(len(slots)))
    rows = max(1, search.tile_elements(x.device) // max(1, x.shape[1]))
    for chunk, slot in zip(x.split(rows), slots.split(rows), strict=True):
        sums.index_add_(0, slot, chunk.double())
    return counts[:-1].float(), sums[:-1].float()
