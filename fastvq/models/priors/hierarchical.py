"""Prior of a VQ-VAE-2: one autoregressive prior for each grid, conditioned on all coarser ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats
from .inputs import Inputs
from .scales import ScalePrior
from .transformer import Block, Cache


class HierarchicalPrior(ScalePrior):
    """One prior for each grid of a VQ-VAE-2, from the coarsest on.

        p(indices) = prod_l p(indices of grid l | indices of the coarser grids),   each in raster order

    The prior of a grid is a transformer with causal self-attention. The inputs of a place are its known neighbors, as a
    masked convolution would see them (`Inputs`), and, below the coarsest grid, what convolutions find in the codes
    above, upsampled to the grid: at any place they see what the codes above say about the places to come as well.

    Args:
        codebook_size, grid, scales, classes, label_dropout: see `ScalePrior`.
        dim: width. depth: blocks for each grid. heads: of each attention; they divide dim.
        dropout: in training, dropout on what each attention and perceptron adds.
        vectors: (K, D), the code vectors of all grids, or those of each, see `TransformerPrior`.

    Shapes: indices (B, T) int64 in [0, K), the coarsest grid first; labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Source: Razavi, van den Oord, Vinyals, Generating Diverse High-Fidelity Images with VQ-VAE-2, 2019, section 3.2;
    attention and masked convolutions together: Chen et al., PixelSNAIL, 2018.
    """

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        scales: Sequence[Sequence[int]],
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        vectors: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"depth": depth, "heads": heads, "dropout": dropout}
        super().__init__(
            codebook_size, grid, scales=scales, dim=dim, classes=classes, label_dropout=label_dropout, **sizes
        )
        if dim % heads:
            raise ValueError(f"heads: must divide dim={dim}, got {heads}")
        parts = [_Grid(self.sizes[0], shape, classes, dim, depth, heads, dropout) for shape in self.scales]
        self.parts: Any = nn.ModuleList(parts)
        self.start_from_vectors(vectors, [[codes.weight for codes in part.inputs.codes] for part in parts])

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        rows = self.rows_to_learn(labels, len(flat), flat.device)
        above, logits = None, []
        for scale, (part, head, span) in enumerate(zip(self.parts, self.heads, self.spans, strict=True)):
            above = self.features_of(Floats(), scale, above, flat)
            logits.append(head(part(flat[:, span], rows, above)))
        return torch.cat(logits, 1)

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> _State:
        return _State(labels)

    def step(self, arithmetic: Arithmetic, state: _State, indices: Tensor, place: int) -> Tensor:
        scale = self.scale_of(place)
        part, head, span = self.parts[scale], self.heads[scale], self.spans[scale]
        if place == span.start:
            state.above = self.features_of(arithmetic, scale, state.above, indices)
            state.begun = part.inputs.begin(arithmetic, state.labels)
            state.caches = [block.cache(state.begun[1], part.inputs.places) for block in part.blocks]
        within = place - span.start
        x = part.inputs.at(arithmetic, state.begun, indices[:, span], within)
        if state.above is not None:
            x = x + state.above[:, within]
        for block, cache in zip(part.blocks, state.caches, strict=True):
            x = block.step(arithmetic, x, cache, within)
        return arithmetic.linear(arithmetic.norm(x, part.norm), head.weight, head.bias)


@dataclass
class _State:
    """State of the prior after some places: that of the grid that is being sampled."""

    labels: Tensor
    above: Tensor | None = None  # (B, places, dim), features from the coarser grids
    begun: Any = None
    caches: list[Cache] = field(default_factory=list)


class _Grid(nn.Module):
    """Prior of one grid, up to its last layer."""

    def __init__(
        self, codebook_size: int, shape: tuple[int, ...], classes: int, dim: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.inputs = Inputs((codebook_size,), shape, classes, dim, staged=False)
        self.blocks = nn.ModuleList([Block(dim, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, indices: Tensor, labels: Tensor, above: Tensor | None) -> Tensor:
        """Return features (B, places, dim) of the grid's indices (B, places) and rows of labels (B,)."""
        x = self.inputs(indices, labels)
        x = x if above is None else x + above
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
