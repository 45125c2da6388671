"""Input features of the places of a grid: known neighboring indices, position and label."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats

_INPUT_SIZE, _HEAD_SIZE = 0.5, 0.05  # scale of weights that are initialized from code vectors


class Inputs(nn.Module):
    """Sum of learned vectors (B, places, dim), one for each input of a place.

    The inputs are the index before the place and, in grids of two or three axes, the indices above it and above to the
    right; its position along each axis; and the label.

    Args:
        codebook_size, grid, classes: as in the prior. dim: width.
    """

    def __init__(self, codebook_size: int, grid: tuple[int, ...], classes: int, dim: int) -> None:
        super().__init__()
        self.grid, self.places = grid, math.prod(grid)
        # Distances back in raster order of the indices that a place sees.
        self.offsets = (1, *(o for o in (grid[-1], grid[-1] - 1) if len(grid) > 1 and 0 < o < self.places))
        self.codes: Any = nn.ModuleList([nn.Embedding(codebook_size, dim) for _ in self.offsets])
        self.start = nn.Parameter(torch.zeros(dim))
        self.labels = nn.Embedding(classes + 1, dim)
        self.axes: Any = nn.ModuleList([nn.Embedding(length, dim) for length in grid])
        for embedding in (*self.codes, self.labels, *self.axes):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, indices: Tensor, labels: Tensor) -> Tensor:
        """Return the inputs of indices (B, places) and rows of labels (B,)."""
        x = F.pad(self.start[None], (0, 0, 0, self.places - 1)) + self.positions(Floats())
        for offset, vectors in zip(self.offsets, self.codes, strict=True):
            x = x + F.pad(vectors(indices[:, : self.places - offset]), (0, 0, offset, 0))
        return x + self.labels(labels)[:, None]

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (positions, vectors of the labels), the state that `at` takes."""
        return self.positions(arithmetic), arithmetic.constant(self.labels.weight)[labels]

    def at(self, arithmetic: Arithmetic, begun: tuple[Tensor, Tensor], indices: Tensor, place: int) -> Tensor:
        """Return the inputs (B, dim) of one place."""
        positions, labels = begun
        x = labels + positions[place]
        if place == 0:
            x = x + arithmetic.constant(self.start)
        for offset, vectors in zip(self.offsets, self.codes, strict=True):
            if offset <= place:
                x = x + arithmetic.constant(vectors.weight)[indices[:, place - offset]]
        return x

    def positions(self, arithmetic: Arithmetic) -> Tensor:
        """Return the positional vectors (places, dim)."""
        total: Any = 0
        for axis, embedding in enumerate(self.axes):
            shape = [1] * len(self.grid)
            shape[axis] = self.grid[axis]
            total = total + arithmetic.constant(embedding.weight).reshape(*shape, -1)
        return total.expand(*self.grid, -1).flatten(0, -2)


@torch.no_grad()
def start_from(vectors: Tensor, codebook_size: int, inputs: list[Tensor], heads: list[Tensor]) -> None:
    """Set weights (K, width) to random linear functions of the code vectors (K, D), so that similar codes start alike.

    Raises:
        ValueError: the vectors have another shape.
    """
    if vectors.dim() != 2 or len(vectors) != codebook_size:
        raise ValueError(f"vectors: must have shape ({codebook_size}, D), got {tuple(vectors.shape)}")
    centered = vectors.detach().float().cpu() - vectors.detach().float().cpu().mean(0)
    centered = centered / centered.square().mean().sqrt().clamp_min(1e-12)
    for weight, size in [*((w, _INPUT_SIZE) for w in inputs), *((w, _HEAD_SIZE) for w in heads)]:
        directions = torch.randn(centered.shape[1], weight.shape[1]) / math.sqrt(centered.shape[1])
        weight.copy_(size * centered @ directions)


def zero_head(width: int, codebook_size: int) -> nn.Linear:
    """Return a last layer of zeros: an untrained prior predicts a uniform distribution."""
    head = nn.Linear(width, codebook_size)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
