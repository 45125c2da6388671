"""Base of priors over indices in several scales: shapes, and features from the coarser scales."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic
from .base import Prior
from .inputs import start_from, zero_head

Shapes = tuple[tuple[int, ...], ...]


class ScalePrior(Prior):
    """Base class of priors over a sequence of indices (B, T) that consists of grids, the coarsest first.

    Args:
        codebook_size: K of all grids.
        grid: (T,), with T the number of indices of all grids.
        scales: shape of each grid, all with the same number of axes; none has fewer positions along an axis than the
            one before.
        dim: width. classes, label_dropout, settings: see `Prior`.

    Attributes:
        scales: the shapes.
        spans: the places of each grid in the sequence.
    """

    in_scales = True

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        scales: Sequence[Sequence[int]],
        dim: int,
        classes: int,
        label_dropout: float,
        **settings: Any,
    ) -> None:
        shapes = tuple(tuple(shape) for shape in scales)
        described = {"scales": [list(shape) for shape in shapes], "dim": dim, **settings}
        super().__init__(codebook_size, grid, classes=classes, label_dropout=label_dropout, **described)
        _check_scales(shapes, self.grid)
        if self.staged:
            raise ValueError(f"codebook_size: must be one number, that of all scales, got {codebook_size}")
        self.scales = shapes
        ends = list(itertools.accumulate(map(math.prod, shapes)))
        self.spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.above: Any = nn.ModuleList(
            [_Above(self.sizes[0], coarse, fine, dim) for coarse, fine in itertools.pairwise(shapes)]
        )
        self.heads: Any = nn.ModuleList([zero_head(dim, self.sizes[0]) for _ in shapes])

    def scale_of(self, place: int) -> int:
        """Return the number of the grid that a place belongs to."""
        return next(scale for scale, span in enumerate(self.spans) if place < span.stop)

    def features_of(self, arithmetic: Arithmetic, scale: int, before: Tensor | None, indices: Tensor) -> Tensor | None:
        """Return features (B, places, dim) of a scale from the indices (B, T) of the coarser ones.

        `before` are those of the scale before; the coarsest has none.
        """
        return None if scale == 0 else self.above[scale - 1](arithmetic, before, indices[:, self.spans[scale - 1]])

    def start_from_vectors(self, vectors: Tensor | Sequence[Tensor] | None, inputs: Sequence[list[Tensor]]) -> None:
        """Let similar codes of each scale start alike, see `start_from`.

        Args:
            vectors: (K, D), the code vectors of all scales, or those of each.
            inputs: more input weights (K, dim) of each scale.

        Raises:
            ValueError: there are vectors of another number of scales, or of another shape.
        """
        if vectors is None:
            return
        own = [vectors] * len(self.scales) if isinstance(vectors, Tensor) else list(vectors)
        if len(own) != len(self.scales):
            raise ValueError(f"vectors: must be {len(self.scales)} codebooks, one for each scale, got {len(own)}")
        above = [[layer.codes.weight] for layer in self.above]
        for codes, more, head, embedded in zip(own, inputs, self.heads, [*above, []], strict=True):
            start_from(codes, self.sizes[0], [*embedded, *more], [head.weight])


class _Above(nn.Module):
    """Features of one scale from the indices of the scale before and from that scale's own features.

        x = up(before + codes[indices]),   y = x + out(gelu(around(neighborhood of x)))

    A neighborhood has three positions along every axis. All positions above are known, so nothing is masked.
    """

    def __init__(self, codebook_size: int, coarse: tuple[int, ...], fine: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.coarse, self.fine = coarse, fine
        self.codes = nn.Embedding(codebook_size, dim)
        self.around = nn.Linear(3 ** len(fine) * dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.normal_(self.codes.weight, std=0.02)

    def forward(self, arithmetic: Arithmetic, before: Tensor | None, indices: Tensor) -> Tensor:
        """Return features (B, places, dim) for indices (B, places of the coarser scale)."""
        x = arithmetic.constant(self.codes.weight)[indices]
        x = (x if before is None else x + before).unflatten(1, self.coarse)
        for axis, (short, long) in enumerate(zip(self.coarse, self.fine, strict=True), start=1):
            x = x.index_select(axis, torch.arange(long, device=x.device) * short // long)
        hidden = arithmetic.gelu(arithmetic.linear(_neighborhoods(x), self.around.weight, self.around.bias))
        return (x + arithmetic.linear(hidden, self.out.weight, self.out.bias)).flatten(1, -2)


def _neighborhoods(x: Tensor) -> Tensor:
    """Return x (B, *grid, dim) with the features of three positions along every axis side by side, zeros beyond."""
    sides = x.shape[1:-1]
    padded = F.pad(x, (0, 0, *[1] * 2 * len(sides)))
    parts = []
    for shifts in itertools.product(range(3), repeat=len(sides)):
        part = padded
        for axis, (shift, length) in enumerate(zip(shifts, sides, strict=True), start=1):
            part = part.narrow(axis, shift, length)
        parts.append(part)
    return torch.cat(parts, -1)


def _check_scales(shapes: Shapes, grid: tuple[int, ...]) -> None:
    listed = ", ".join("x".join(map(str, shape)) for shape in shapes)
    if not shapes or len({len(shape) for shape in shapes}) > 1 or min(map(min, shapes)) < 1:
        raise ValueError(f"scales: must be grids with positive sides and the same number of axes, got {listed}")
    for coarse, fine in itertools.pairwise(shapes):
        if any(short > long for short, long in zip(coarse, fine, strict=True)):
            raise ValueError(f"scales: must not shrink from one to the next, got {listed}")
    if grid != (sum(map(math.prod, shapes)),):
        raise ValueError(f"grid: must be the number of indices of the scales {listed}, got {grid}")
