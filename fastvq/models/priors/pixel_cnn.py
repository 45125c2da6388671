"""Convolutional prior of the original paper: masked convolutions over the grid of indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats
from .base import Prior
from .inputs import start_from, zero_head


class _State(NamedTuple):
    labels: Tensor
    codes: Tensor  # (B, H, W, dim), embeddings of the indices known so far
    vertical: list[Tensor]  # outputs of each layer's vertical stack, by row
    handed_down: list[Tensor]  # its inputs to the horizontal stack
    horizontal: list[Tensor]  # outputs of each layer's horizontal stack, by place


class PixelCNNPrior(Prior):
    """Gated PixelCNN over grids of indices with one or two axes, with or without classes.

        y = tanh(W_f * x + V_f h) sigmoid(W_g * x + V_g h)

    for a label's vector h, in two stacks: the vertical one sees the rows above, the horizontal one sees its row up to
    the previous place and the output of the vertical one. So a place sees all earlier places within reach, without a
    blind spot. The first layer reaches two rows and columns, the others one.

    Args:
        codebook_size, grid, classes, label_dropout: see `Prior`.
        dim: channels. depth: layers.
        dropout: in training, dropout on what each layer adds.
        vectors: (K, D), the code vectors, from which the weights are initialized so that similar codes start alike.

    Shapes: indices (B, *grid) int64 in [0, K); labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Source: van den Oord et al., Conditional Image Generation with PixelCNN Decoders, 2016, section 2, equation 4 and
    figure 2.
    """

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        dim: int = 128,
        depth: int = 6,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        vectors: Tensor | None = None,
    ) -> None:
        sizes = {"dim": dim, "depth": depth, "dropout": dropout}
        super().__init__(codebook_size, grid, classes=classes, label_dropout=label_dropout, **sizes)
        if not isinstance(self.codebook_size, int):
            raise ValueError(
                f"kind: a pixelcnn takes one index at each position, not {len(self.sizes)}: transformer and lstm do"
            )
        if len(grid) > 2:
            raise ValueError(f"grid: must have one or two axes for a PixelCNN, got {grid}")
        self.height, self.width = self.places // self.grid[-1], self.grid[-1]
        self.codes = nn.Embedding(self.codebook_size, dim)
        self.layers: Any = nn.ModuleList([_Layer(dim, classes, dropout, first=i == 0) for i in range(depth)])
        self.last = nn.Linear(dim, dim)
        self.head = zero_head(dim, self.codebook_size)
        nn.init.normal_(self.codes.weight, std=0.02)
        if vectors is not None:
            start_from(vectors, self.codebook_size, [self.codes.weight], [self.head.weight])

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        rows = self.rows_to_learn(labels, len(flat), flat.device)
        vertical = horizontal = self.codes(flat).unflatten(1, (self.height, self.width))
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, rows)
        hidden = F.relu(self.last(F.relu(horizontal.flatten(1, 2))))
        return self.head(hidden)

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> _State:
        vectors = arithmetic.constant(self.codes.weight)
        size = (len(labels), self.height, self.width)

        def maps(times: int) -> list[Tensor]:
            return [vectors.new_zeros(*size, times * vectors.shape[1]) for _ in self.layers]

        return _State(labels, vectors.new_zeros(*size, vectors.shape[1]), maps(1), maps(2), maps(1))

    def step(self, arithmetic: Arithmetic, state: _State, indices: Tensor, place: int) -> Tensor:
        y, x = divmod(place, self.width)
        if place:
            before = arithmetic.constant(self.codes.weight)[indices[:, place - 1]]
            state.codes.flatten(1, 2)[:, place - 1] = before
        if x == 0:
            vertical = state.codes
            for layer, gives, tells in zip(self.layers, state.vertical, state.handed_down, strict=True):
                gives[:, y], tells[:, y] = layer.row(arithmetic, vertical, state.labels, y)
                vertical = gives
        horizontal = state.codes
        for layer, tells, gives in zip(self.layers, state.handed_down, state.horizontal, strict=True):
            gives[:, y, x] = layer.place(arithmetic, horizontal[:, y], tells[:, y, x], state.labels, x)
            horizontal = gives
        hidden = arithmetic.linear(horizontal[:, y, x].clamp_min(0), self.last.weight, self.last.bias)
        return arithmetic.linear(hidden.clamp_min(0), self.head.weight, self.head.bias)


class _Layer(nn.Module):
    """One layer of both stacks. Convolutions are linear layers over the concatenated neighbors."""

    def __init__(self, dim: int, classes: int, dropout: float, *, first: bool) -> None:
        super().__init__()
        self.first = first
        # The first layer must not see its own place; after it, a place's features depend on earlier indices alone.
        self.rows = self.behind = (-2, -1) if first else (-1, 0)
        self.columns = range(-2, 3) if first else range(-1, 2)
        self.vertical = nn.Linear(len(self.rows) * len(self.columns) * dim, 2 * dim)
        self.down = nn.Linear(2 * dim, 2 * dim)
        self.horizontal = nn.Linear(len(self.behind) * dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.vertical_labels, self.horizontal_labels = (nn.Embedding(classes + 1, 2 * dim) for _ in range(2))
        for embedding in (self.vertical_labels, self.horizontal_labels):
            nn.init.normal_(embedding.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return both stacks (B, H, W, dim) at all places."""
        height, width = vertical.shape[1:3]
        reach = -self.columns[0]
        padded = F.pad(vertical, (0, 0, reach, reach, -self.rows[0], 0))
        above = [
            padded[:, row - self.rows[0] :, column + reach :][:, :height, :width]
            for row in self.rows
            for column in self.columns
        ]
        found = self.vertical(torch.cat(above, -1)) + self.vertical_labels(labels)[:, None, None]
        padded = F.pad(horizontal, (0, 0, -self.behind[0], 0))
        left = [padded[:, :, column - self.behind[0] :][:, :, :width] for column in self.behind]
        gated = self.horizontal(torch.cat(left, -1)) + self.down(found) + self.horizontal_labels(labels)[:, None, None]
        added = self.dropout(self.out(_gate(Floats(), gated)))
        return _gate(Floats(), found), added if self.first else horizontal + added

    def row(self, arithmetic: Arithmetic, vertical: Tensor, labels: Tensor, y: int) -> tuple[Tensor, Tensor]:
        """Return row y of the vertical stack, (B, W, dim), and its input to the horizontal stack, (B, W, 2 dim)."""
        width, reach = vertical.shape[2], -self.columns[0]
        rows = [vertical[:, y + row] if y + row >= 0 else torch.zeros_like(vertical[:, 0]) for row in self.rows]
        padded = [F.pad(row, (0, 0, reach, reach)) for row in rows]
        above = torch.cat([row[:, column + reach :][:, :width] for row in padded for column in self.columns], -1)
        found = arithmetic.linear(above, self.vertical.weight, self.vertical.bias)
        found = found + arithmetic.constant(self.vertical_labels.weight)[labels][:, None]
        return _gate(arithmetic, found), arithmetic.linear(found, self.down.weight, self.down.bias)

    def place(self, arithmetic: Arithmetic, row: Tensor, told: Tensor, labels: Tensor, x: int) -> Tensor:
        """Return the horizontal stack (B, dim) at place x of its row (B, W, dim)."""
        left = [row[:, x + column] if x + column >= 0 else torch.zeros_like(row[:, 0]) for column in self.behind]
        gated = arithmetic.linear(torch.cat(left, -1), self.horizontal.weight, self.horizontal.bias) + told
        gated = gated + arithmetic.constant(self.horizontal_labels.weight)[labels]
        added = arithmetic.linear(_gate(arithmetic, gated), self.out.weight, self.out.bias)
        return added if self.first else row[:, x] + added


def _gate(arithmetic: Arithmetic, x: Tensor) -> Tensor:
    values, gates = x.chunk(2, -1)
    return arithmetic.multiply(arithmetic.tanh(values), arithmetic.sigmoid(gates))
