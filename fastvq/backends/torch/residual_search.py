"""The op `residual_search` in torch operations: one certified search a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype, stages_of

from .search import search


def residual_search(x: Tensor, codebooks: Iterable[Tensor], *, metric: str = "l2") -> Tensor:
    """Implement `fastvq.residual_search`."""
    return search_stages(search, x, codebooks, metric=metric)


def search_stages(
    search: Callable[..., Tensor], x: Tensor, codebooks: Iterable[Tensor], *, metric: str = "l2"
) -> Tensor:
    """Return the indices (N, Q) of rows (N, D) in codebooks (K_q, D) by one `search` for each stage."""
    residual = x
    stages = []
    for codebook in stages_of(codebooks):
        indices = search(residual, codebook, metric=metric)
        stages.append(indices)
        codes = codebook[indices.clamp_min(0)].masked_fill((indices < 0)[:, None], 0)
        dtype = compute_dtype(residual, codebook)
        residual = (residual.to(dtype) - codes.to(dtype)).float()
    return torch.stack(stages, 1)
