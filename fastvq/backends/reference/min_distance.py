"""The op `min_distance_` by definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import chunk_rows, widen


def min_distance_(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    """Implement `fastvq.min_distance_`: round each float64 sum to float32 once. `fmin` ignores a NaN."""
    rows = chunk_rows(x.shape[1])
    for chunk, nearest in zip(x.split(rows), distances.split(rows), strict=True):
        for code in widen(codes):
            found = (widen(chunk) - code).square().sum(1).float()
            nearest.copy_(torch.fmin(nearest, found))
