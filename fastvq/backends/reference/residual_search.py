"""The op `residual_search` by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype

from .search import search


def residual_search(x: Tensor, codebooks: Tensor) -> Tensor:
    """`fastvq.residual_search`, level by level."""
    residual = x
    levels = []
    for codebook in codebooks:
        indices = search(residual, codebook)
        levels.append(indices)
        codes = codebook[indices.clamp_min(0)].masked_fill((indices < 0)[:, None], 0)
        dtype = compute_dtype(residual, codebook)
        residual = (residual.to(dtype) - codes.to(dtype)).float()
    return torch.stack(levels, 1)
