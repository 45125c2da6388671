"""What a place of a grid is told: the codes around it that are known, where it is, and the label."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats

_INPUT_SIZE, _HEAD_SIZE = 0.5, 0.05  # of weights that start from the codes' vectors


class Inputs(nn.Module):
    """The sum of a learned vector for each thing that a place knows, (B, places, dim).

    That is the code before it and, in grids of two or three axes, the ones above it and above to the right; its index
    along each axis; and the label.

    Args:
        codebook_size, grid, classes: of the prior. dim: width.
    """

    def __init__(self, codebook_size: int, grid: tuple[int, ...], classes: int, dim: int) -> None:
        super().__init__()
        self.grid, self.places = grid, math.prod(grid)
        # How far back a place looks for a code that it is given, with the vectors of these codes.
        self.offsets = (1, *(o for o in (grid[-1], grid[-1] - 1) if len(grid) > 1 and 0 < o < self.places))
        self.codes: Any = nn.ModuleList([nn.Embedding(codebook_size, dim) for _ in self.offsets])
        self.start = nn.Parameter(torch.zeros(dim))
        self.labels = nn.Embedding(classes + 1, dim)
        self.axes: Any = nn.ModuleList([nn.Embedding(length, dim) for length in grid])
        for embedding in (*self.codes, self.labels, *self.axes):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Of codes (B, places) and rows of labels (B,)."""
        x = F.pad(self.start[None], (0, 0, 0, self.places - 1)) + self.positions(Floats())
        for offset, vectors in zip(self.offsets, self.codes, strict=True):
            x = x + F.pad(vectors(codes[:, : self.places - offset]), (0, 0, offset, 0))
        return x + self.labels(labels)[:, None]

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(positions, vectors of the labels), which `at` takes."""
        return self.positions(arithmetic), arithmetic.constant(self.labels.weight)[labels]

    def at(self, arithmetic: Arithmetic, begun: tuple[Tensor, Tensor], codes: Tensor, place: int) -> Tensor:
        """(B, dim): one place of it."""
        positions, labels = begun
        x = labels + positions[place]
        if place == 0:
            x = x + arithmetic.constant(self.start)
        for offset, vectors in zip(self.offsets, self.codes, strict=True):
            if offset <= place:
                x = x + arithmetic.constant(vectors.weight)[codes[:, place - offset]]
        return x

    def positions(self, arithmetic: Arithmetic) -> Tensor:
        """(places, dim)."""
        total: Any = 0
        for axis, embedding in enumerate(self.axes):
            shape = [1] * len(self.grid)
            shape[axis] = self.grid[axis]
            total = total + arithmetic.constant(embedding.weight).reshape(*shape, -1)
        return total.expand(*self.grid, -1).flatten(0, -2)


@torch.no_grad()
def start_from(vectors: Tensor, codebook_size: int, inputs: list[Tensor], heads: list[Tensor]) -> None:
    """Weights (K, width) that are a random linear function of the codes' vectors (K, D): similar codes start alike.

    Raises:
        ValueError: vectors of another shape.
    """
    if vectors.dim() != 2 or len(vectors) != codebook_size:
        raise ValueError(f"vectors: must have shape ({codebook_size}, D), got {tuple(vectors.shape)}")
    centred = vectors.detach().float().cpu() - vectors.detach().float().cpu().mean(0)
    centred = centred / centred.square().mean().sqrt().clamp_min(1e-12)
    for weight, size in [*((w, _INPUT_SIZE) for w in inputs), *((w, _HEAD_SIZE) for w in heads)]:
        directions = torch.randn(centred.shape[1], weight.shape[1]) / math.sqrt(centred.shape[1])
        weight.copy_(size * centred @ directions)


def zero_head(width: int, codebook_size: int) -> nn.Linear:
    """The last layer of a prior that is uniform before it has learned anything."""
    head = nn.Linear(width, codebook_size)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
