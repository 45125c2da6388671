"""The op `residual_search` by definition: one search a stage."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastvq.backends.arithmetic import stages_of, widen

from .search import search


def residual_search(x: Tensor, codebooks: Iterable[Tensor], *, metric: str = "l2") -> Tensor:
    """Implement `fastvq.residual_search`.

    A float32 difference is the float64 difference, rounded once more: float64 has more than twice the digits.
    """
    residual, stages = x, []
    for codebook in stages_of(codebooks):
        indices = search(residual, codebook, metric=metric)
        codes = widen(codebook)[indices]
        codes[indices < 0] = 0
        residual = (widen(residual) - codes).float()
        stages.append(indices)
    return torch.stack(stages, 1)
