"""Prior that predicts a whole scale at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats
from .scales import ScalePrior
from .transformer import Block, Cache


class NextScalePrior(ScalePrior):
    """Transformer that predicts all indices of a scale at once, from those of the coarser scales.

        p(indices) = prod_l prod_i p(index i of scale l | indices of the coarser scales)

    The indices of a scale are independent of each other, given the coarser scales: a sample takes as many passes as
    there are scales, whatever their size. Attention is causal over scales and free within each. The inputs of a place
    are what the codes of the coarser scales say, upsampled, its position, and the label.

    This suits residual scales (`HierarchicalVQ`), where a scale has details that depend little on each other. Under a
    prior in raster order indices take fewer bits, since it knows the neighbors.

    Args:
        codebook_size, grid, scales, classes, label_dropout: see `ScalePrior`.
        dim: width. depth: blocks. heads: of each attention; they divide dim.
        dropout: in training, dropout on what each attention and perceptron adds.
        vectors: (K, D), the code vectors of all scales, or those of each, see `TransformerPrior`.

    Shapes: indices (B, T) int64 in [0, K), the coarsest scale first; labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Source: Tian et al., Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction (VAR),
    2024, section 3.2.
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
        self.positions, self.labels = nn.Embedding(self.places, dim), nn.Embedding(classes + 1, dim)
        for embedding in (self.positions, self.labels):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks: Any = nn.ModuleList([Block(dim, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.start_from_vectors(vectors, [[] for _ in self.scales])

    @property
    def drawn_together(self) -> list[range]:
        return [range(span.start, span.stop) for span in self.spans]

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        rows = self.rows_to_learn(labels, len(flat), flat.device)
        floats, above, inputs = Floats(), None, []
        for scale in range(len(self.scales)):
            above = self.features_of(floats, scale, above, flat)
            inputs.append(self._inputs(floats, scale, above, self.labels(rows)))
        x = torch.cat(inputs, 1)
        ends = [span.stop for span in self.spans for _ in range(span.start, span.stop)]
        # Row i attends to the places before the end of its scale.
        mask = torch.arange(self.places, device=x.device) < torch.tensor(ends, device=x.device)[:, None]
        for block in self.blocks:
            x = block(x, mask)
        hidden = self.norm(x)
        return torch.cat([head(hidden[:, span]) for head, span in zip(self.heads, self.spans, strict=True)], 1)

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> _State:
        vectors = arithmetic.constant(self.labels.weight)[labels]
        return _State(vectors, [block.cache(vectors, self.places) for block in self.blocks])

    def step(self, arithmetic: Arithmetic, state: _State, indices: Tensor, place: int) -> Tensor:
        scale = self.scale_of(place)
        first, head = self.spans[scale].start, self.heads[scale]
        if place == first:
            state.above = self.features_of(arithmetic, scale, state.above, indices)
            x = self._inputs(arithmetic, scale, state.above, state.labels)
            for block, cache in zip(self.blocks, state.caches, strict=True):
                x = block.extend(arithmetic, x, cache, first)
            state.logits = arithmetic.linear(arithmetic.norm(x, self.norm), head.weight, head.bias)
        assert state.logits is not None
        return state.logits[:, place - first]

    def _inputs(self, arithmetic: Arithmetic, scale: int, above: Tensor | None, labels: Tensor) -> Tensor:
        """Return the inputs (B, places, dim) of a scale, for features from above and vectors of labels (B, dim)."""
        x = arithmetic.constant(self.positions.weight)[self.spans[scale]] + labels[:, None]
        return x if above is None else x + above


@dataclass
class _State:
    """State of the prior after some scales."""

    labels: Tensor  # (B, dim), their vectors
    caches: list[Cache]
    above: Tensor | None = None  # (B, places, dim), features of the scale from the coarser ones
    logits: Tensor | None = None  # (B, places, K), those of the scale
