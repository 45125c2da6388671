"""The op `accumulate` by definition: row after row, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Implement `fastvq.accumulate`: add the rows in ascending order and round the sums to float32 once."""
    check_index_range(indices, codebook_size)
    counts = x.new_zeros(codebook_size, dtype=torch.float64)
    sums = x.new_zeros(codebook_size, x.shape[1], dtype=torch.float64)
    for row, k in zip(x.double(), indices.tolist(), strict=True):
        if k >= 0:
            counts[k] += 1
            sums[k] += row
    return counts.float(), sums.float()
