"""The op `residual_search` in torch operations: one certified search a stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype

from .search import search


def residual_search(x: Tensor, codebooks: Tensor) -> Tensor:
    """Implement `fastvq.residual_search`."""
    return search_stages(search, x, codebooks)


def search_stages(search: Callable[[Tensor, Tensor], Tensor], x: Tensor, codebooks: Tensor) -> Tensor:
    """Return the indices (N, Q) of rows (N, D) in codebooks (Q, K, D) by one `search` for each stage."""
    residual = x
    stages = []
    for codebook in codebooks:
        indices = search(residual, codebook)
        stages.append(indices)
        codes = codebook[indices.clamp_min(0)].masked_fill((indices < 0)[:, None], 0)
        dtype = compute_dtype(residual, codebook)
        residual = (residual.to(dtype) - codes.to(dtype)).float()
    return torch.stack(stages, 1)
