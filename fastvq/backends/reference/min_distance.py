"""How far rows are from the codes that there are so far, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import chunk_rows, widen


def min_distance_(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    """`fastvq.min_distance_`: float64 sums, rounded to float32 once; fmin passes over what is no number."""
    rows = chunk_rows(x.shape[1])
    for chunk, nearest in zip(x.split(rows), distances.split(rows), strict=True):
        for code in widen(codes):
            found = (widen(chunk) - code).square().sum(1).float()
            nearest.copy_(torch.fmin(nearest, found))
