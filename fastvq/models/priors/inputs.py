"""Input features of the places of a grid: known neighboring indices, position and label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats

_INPUT_SIZE, _HEAD_SIZE = 0.5, 0.05  # scale of weights that are initialized from code vectors


class Inputs(nn.Module):
    """Sum of learned vectors (B, places, dim), one for each input of a place.

    The inputs are the index before the place and its `neighbors`; its position along each axis; and the label. With
    several indices at each position, they are the index before and, of the same codebook, those of the position before
    and of its neighbors; indices of each codebook have vectors of their own, and the position along the last axis is
    that of the codebook.

    Args:
        sizes: K of the places in turn.
        grid, classes: as in the prior. dim: width.
        staged: whether the last axis of the grid runs over the codebooks.
    """

    def __init__(self, sizes: Sequence[int], grid: tuple[int, ...], classes: int, dim: int, *, staged: bool) -> None:
        super().__init__()
        self.grid, self.places = grid, math.prod(grid)
        self.steps = self.places
        # Distances back in raster order of the indices that a place sees.
        cells = grid[:-1] if staged else grid
        self.offsets = (1, *neighbors(cells))
        if staged:
            self.offsets = tuple(dict.fromkeys([1, *(len(sizes) * o for o in self.offsets)]))
        self.codes: Any = nn.ModuleList([nn.Embedding(sum(sizes), dim) for _ in self.offsets])
        self.start = nn.Parameter(torch.zeros(dim))
        self.labels = nn.Embedding(classes + 1, dim)
        self.axes: Any = nn.ModuleList([nn.Embedding(length, dim) for length in grid])
        self.first_codes = first_codes(sizes)
        for embedding in (*self.codes, self.labels, *self.axes):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, indices: Tensor, labels: Tensor) -> Tensor:
        """Return the inputs of indices (B, places) and rows of labels (B,)."""
        if len(self.first_codes) > 1:
            firsts = torch.tensor(self.first_codes, device=indices.device)
            indices = indices + firsts.repeat(self.places // len(firsts))
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
                rows = indices[:, place - offset] + self.first_codes[(place - offset) % len(self.first_codes)]
                x = x + arithmetic.constant(vectors.weight)[rows]
        return x

    def positions(self, arithmetic: Arithmetic) -> Tensor:
        """Return the positional vectors (places, dim)."""
        total: Any = 0
        for axis, embedding in enumerate(self.axes):
            shape = [1] * len(self.grid)
            shape[axis] = self.grid[axis]
            total = total + arithmetic.constant(embedding.weight).reshape(*shape, -1)
        return total.expand(*self.grid, -1).flatten(0, -2)


class DelayedInputs(nn.Module):
    """Sum of learned vectors (B, steps, dim) for each step of the delay pattern.

    Step s takes the indices of codebooks q at positions s - delay q of the raster order. Its inputs are, for each of
    these, the index of the same codebook at the position before and at its `neighbors`; the number of the step; and the
    label.

    Args:
        sizes: K of each codebook.
        grid: shape of a sample's indices, with the codebooks along the last axis.
        classes: as in the prior. dim: width.
        delay: 1, or 0 for steps that take all codebooks of one position.

    Attributes:
        order: the places, position after position with its codebooks, in the order of the steps.
    """

    def __init__(self, sizes: Sequence[int], grid: tuple[int, ...], classes: int, dim: int, *, delay: int = 1) -> None:
        super().__init__()
        cells, self.stages = grid[:-1], len(sizes)
        self.cells = math.prod(cells)
        self.delay = delay
        self.steps = self.cells + delay * (self.stages - 1)
        self.offsets = tuple(dict.fromkeys([1, *neighbors(cells)]))
        self.codes: Any = nn.ModuleList([nn.Embedding(sum(sizes), dim) for _ in self.offsets])
        self.start = nn.Parameter(torch.zeros(dim))
        self.labels = nn.Embedding(classes + 1, dim)
        self.number = nn.Embedding(self.steps, dim)
        self.first_codes = first_codes(sizes)
        self.order = sorted(range(self.cells * self.stages), key=self.step_of)
        for embedding in (*self.codes, self.labels, self.number):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, indices: Tensor, labels: Tensor) -> Tensor:
        """Return the inputs of indices (B, places) and rows of labels (B,)."""
        indices = indices.unflatten(1, (self.cells, self.stages))
        indices = indices + torch.tensor(self.first_codes, device=indices.device)
        x = F.pad(self.start[None], (0, 0, 0, self.steps - 1)) + self.number.weight
        for offset, vectors in zip(self.offsets, self.codes, strict=True):
            known = vectors(indices)  # [B, cells, Q, dim]
            for stage in range(self.stages):
                later = offset + self.delay * stage
                left = self.steps - later
                x = x + F.pad(known[:, :left, stage], (0, 0, later, max(0, left - self.cells)))
        return x + self.labels(labels)[:, None]

    def step_of(self, place: int) -> int:
        """Return the step that takes a place."""
        cell, stage = divmod(place, self.stages)
        return cell + self.delay * stage

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (vectors of the steps, vectors of the labels), the state that `at` takes."""
        return arithmetic.constant(self.number.weight), arithmetic.constant(self.labels.weight)[labels]

    def at(self, arithmetic: Arithmetic, begun: tuple[Tensor, Tensor], indices: Tensor, step: int) -> Tensor:
        """Return the inputs (B, dim) of one step."""
        numbers, labels = begun
        x = labels + numbers[step]
        if step == 0:
            x = x + arithmetic.constant(self.start)
        for offset, vectors in zip(self.offsets, self.codes, strict=True):
            for stage, first in enumerate(self.first_codes):
                # The cell that lies so far before the one which the step predicts for this stage.
                cell = step - self.delay * stage - offset
                if 0 <= cell < self.cells:
                    rows = indices[:, cell * self.stages + stage] + first
                    x = x + arithmetic.constant(vectors.weight)[rows]
        return x


def neighbors(cells: tuple[int, ...]) -> list[int]:
    """Return the distances back in raster order of the neighbors of a position other than the one before.

    In grids of two axes they are above it and above to the right; in grids of three, whose first axis is time, also at
    the same place of the frame before.
    """
    distances = []
    if len(cells) > 1:
        distances += [cells[-1], cells[-1] - 1]
    if len(cells) > 2:
        distances.append(math.prod(cells[-2:]))
    return [distance for distance in distances if 0 < distance < math.prod(cells)]


def first_codes(sizes: Sequence[int]) -> list[int]:
    """Return, for each codebook, the row at which its vectors begin in a table of those of all."""
    return [sum(sizes[:stage]) for stage in range(len(sizes))]


class StageHeads(nn.Module):
    """Last layers of a prior, one for each codebook, that begin at zero: an untrained prior is uniform."""

    def __init__(self, width: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers: Any = nn.ModuleList([zero_head(width, size) for size in sizes])

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (B, cells Q, K) of hidden features (B, cells, Q, width); -inf beyond the codes of a place."""
        largest = max(self.sizes)
        logits = [
            F.pad(layer(hidden[:, :, stage]), (0, largest - size), value=-math.inf)
            for stage, (layer, size) in enumerate(zip(self.layers, self.sizes, strict=True))
        ]
        return torch.stack(logits, 2).flatten(1, 2)

    def at(self, arithmetic: Arithmetic, hidden: Tensor, stage: int) -> Tensor:
        """Return the logits (B, K of the stage) of hidden features (B, width)."""
        layer = self.layers[stage]
        return arithmetic.linear(hidden, layer.weight, layer.bias)


def start_weights(
    vectors: Tensor | Sequence[Tensor], sizes: Sequence[int], inputs: list[Tensor], head: nn.Linear | StageHeads
) -> None:
    """Apply `start_from` to the input weights (sum of sizes, width) and to the head, codebook by codebook.

    Raises:
        ValueError: the vectors have another shape, or belong to another number of codebooks.
    """
    own = [vectors] if isinstance(vectors, Tensor) else list(vectors)
    heads = list(head.layers) if isinstance(head, StageHeads) else [head]
    if len(own) != len(sizes):
        raise ValueError(f"vectors: must be {len(sizes)} codebooks, got {len(own)}")
    first = 0
    for codes, size, layer in zip(own, sizes, heads, strict=True):
        start_from(codes, size, [weight[first : first + size] for weight in inputs], [layer.weight])
        first += size


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
