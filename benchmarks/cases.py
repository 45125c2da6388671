"""Shapes, data and peers of the benchmarks, declared once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastvq
from fastvq import reference

SHAPES = [(16384, 512, 64), (16384, 8192, 64), (65536, 1024, 8), (4096, 1024, 128)]  # N, K, D
CHECKED_ROWS = 256


def gaussian(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Nothing to cluster: the hardest data for a bound."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def clustered(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Vectors around their codes, as behind a trained encoder."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(k, d, generator=generator)
    owner = torch.randint(k, (n,), generator=generator)
    return codes[owner] + 0.15 * torch.randn(n, d, generator=generator), codes


DATA = {"gaussian": gaussian, "clustered": clustered}


def search_by(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    def search(x: Tensor, codebook: Tensor) -> Tensor:
        with fastvq.use_backend(backend):
            return fastvq.search(x, codebook)

    return search


def addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """What a careful user writes: |e|^2 - 2 <x, e> in chunks of rows."""
    norms = codebook.square().sum(1)
    return torch.cat([torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in x.split(1024)])


def cdist_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(1)


SEARCHES = {
    "fastvq native": search_by("native"),
    "fastvq torch": search_by("torch"),
    "addmm + argmin": addmm_argmin,
    "cdist + argmin": cdist_argmin,
}


def mismatches(search: Callable[[Tensor, Tensor], Tensor], x: Tensor, codebook: Tensor) -> int:
    """Of CHECKED_ROWS rows, spread over the batch, how many the search gets wrong."""
    rows = torch.linspace(0, len(x) - 1, CHECKED_ROWS).long()
    return int((search(x, codebook)[rows] != reference.search(x[rows], codebook)).sum())
