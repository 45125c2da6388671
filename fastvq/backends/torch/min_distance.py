"""The op `min_distance_` in torch operations, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype

from . import search


def min_distance_(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    """Implement `fastvq.min_distance_`, in float32 unless an argument is float64."""
    dtype = compute_dtype(x, codes)
    rows = max(1, search.tile_elements(x.device) // x.shape[1])
    for chunk, nearest in zip(x.split(rows), distances.split(rows), strict=True):
        for code in codes.to(dtype):
            # A float64 sum is rounded where it is written.
            torch.fmin(nearest, (chunk.to(dtype) - code).square_().sum(1), out=nearest)
