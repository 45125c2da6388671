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

_AROUND = 3
"""Height and width of the neighborhood that a place sees in the frames before."""


class _State(NamedTuple):
    labels: Tensor
    codes: Tensor  # (B, T, H, W, dim), embeddings of the indices known so far
    temporal: list[Tensor]  # outputs of each layer's temporal stack, by frame
    handed_on: list[Tensor]  # its inputs to the vertical stack, in the frame that is sampled
    vertical: list[Tensor]  # outputs of each layer's vertical stack, by row
    handed_down: list[Tensor]  # its inputs to the horizontal stack
    horizontal: list[Tensor]  # outputs of each layer's horizontal stack, by place


class PixelCNNPrior(Prior):
    """Gated PixelCNN over grids of indices with one to three axes, with or without classes.

        y = tanh(W_f * x + V_f h) sigmoid(W_g * x + V_g h)

    for a label's vector h, in two stacks: the vertical one sees the rows above, the horizontal one sees its row up to
    the previous place and the output of the vertical one. So a place sees all earlier places within reach, without a
    blind spot. The first layer reaches two rows and columns, the others one. In grids of three axes, whose first is
    time, a temporal stack sees the frames before, and the vertical one is given its output.

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
                f"kind: a pixelcnn takes one index at each position, not {len(self.sizes)}: transformer, lstm"
                " and depth do"
            )
        if len(grid) > 3:
            raise ValueError(f"grid: must have one to three axes for a PixelCNN, got {grid}")
        self.size = (*[1] * (3 - len(grid)), *self.grid)
        self.codes = nn.Embedding(self.codebook_size, dim)
        timed = len(grid) == 3
        self.layers: Any = nn.ModuleList(
            [_Layer(dim, classes, dropout, first=i == 0, timed=timed) for i in range(depth)]
        )
        self.last = nn.Linear(dim, dim)
        self.head = zero_head(dim, self.codebook_size)
        nn.init.normal_(self.codes.weight, std=0.02)
        if vectors is not None:
            start_from(vectors, self.codebook_size, [self.codes.weight], [self.head.weight])

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        rows = self.rows_to_learn(labels, len(flat), flat.device)
        temporal = self.codes(flat).unflatten(1, self.size)
        # To the other stacks, each frame is a sample of its own.
        vertical = horizontal = temporal.flatten(0, 1)
        rows = rows.repeat_interleave(self.size[0])
        for layer in self.layers:
            temporal, vertical, horizontal = layer(temporal, vertical, horizontal, rows)
        hidden = F.relu(self.last(F.relu(horizontal.unflatten(0, (len(flat), -1)).flatten(1, 3))))
        return self.head(hidden)

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> _State:
        vectors = arithmetic.constant(self.codes.weight)
        frame = self.size[1:]

        def maps(times: int, size: tuple[int, ...] = frame) -> list[Tensor]:
            return [vectors.new_zeros(len(labels), *size, times * vectors.shape[1]) for _ in self.layers]

        timed = self.size if self.layers[0].temporal is not None else (0, *frame)
        codes = vectors.new_zeros(len(labels), *self.size, vectors.shape[1])
        return _State(labels, codes, maps(1, timed), maps(2), maps(1), maps(2), maps(1))

    def step(self, arithmetic: Arithmetic, state: _State, indices: Tensor, place: int) -> Tensor:
        t, within = divmod(place, self.size[1] * self.size[2])
        y, x = divmod(within, self.size[2])
        if place:
            before = arithmetic.constant(self.codes.weight)[indices[:, place - 1]]
            state.codes.flatten(1, 3)[:, place - 1] = before
        if within == 0 and self.layers[0].temporal is not None:
            temporal = state.codes
            for layer, gives, tells in zip(self.layers, state.temporal, state.handed_on, strict=True):
                gives[:, t], tells[:] = layer.frame(arithmetic, temporal, t)
                temporal = gives
        if x == 0:
            vertical = state.codes[:, t]
            stacks = zip(self.layers, state.handed_on, state.vertical, state.handed_down, strict=True)
            for layer, told, gives, tells in stacks:
                gives[:, y], tells[:, y] = layer.row(arithmetic, vertical, told[:, y], state.labels, y)
                vertical = gives
        horizontal = state.codes[:, t]
        for layer, tells, gives in zip(self.layers, state.handed_down, state.horizontal, strict=True):
            gives[:, y, x] = layer.place(arithmetic, horizontal[:, y], tells[:, y, x], state.labels, x)
            horizontal = gives
        hidden = arithmetic.linear(horizontal[:, y, x].clamp_min(0), self.last.weight, self.last.bias)
        return arithmetic.linear(hidden.clamp_min(0), self.head.weight, self.head.bias)


class _Layer(nn.Module):
    """One layer of all stacks. Convolutions are linear layers over the concatenated neighbors."""

    def __init__(self, dim: int, classes: int, dropout: float, *, first: bool, timed: bool) -> None:
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
        self.frames = self.rows
        self.temporal = nn.Linear(len(self.frames) * _AROUND**2 * dim, 2 * dim) if timed else None
        self.on = nn.Linear(2 * dim, 2 * dim) if timed else None

    def forward(
        self, temporal: Tensor, vertical: Tensor, horizontal: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the stacks at all places: the temporal one (B, T, H, W, dim), the others (B T, H, W, dim)."""
        height, width = vertical.shape[1:3]
        told: Tensor | None = None
        if self.temporal is not None and self.on is not None:
            parts = [self._before(temporal, t) for t in range(temporal.shape[1])]
            found = self.temporal(torch.stack(parts, 1))
            temporal, told = _gate(Floats(), found), self.on(found).flatten(0, 1)
        reach = -self.columns[0]
        padded = F.pad(vertical, (0, 0, reach, reach, -self.rows[0], 0))
        above = [
            padded[:, row - self.rows[0] :, column + reach :][:, :height, :width]
            for row in self.rows
            for column in self.columns
        ]
        found = self.vertical(torch.cat(above, -1)) + self.vertical_labels(labels)[:, None, None]
        if told is not None:
            found = found + told
        padded = F.pad(horizontal, (0, 0, -self.behind[0], 0))
        left = [padded[:, :, column - self.behind[0] :][:, :, :width] for column in self.behind]
        gated = self.horizontal(torch.cat(left, -1)) + self.down(found) + self.horizontal_labels(labels)[:, None, None]
        added = self.dropout(self.out(_gate(Floats(), gated)))
        return temporal, _gate(Floats(), found), added if self.first else horizontal + added

    def _before(self, temporal: Tensor, t: int) -> Tensor:
        """Return the neighbors (B, H, W, n dim) in the frames before frame t of a stack (B, T, H, W, dim)."""
        height, width = temporal.shape[2:4]
        blank, reach = torch.zeros_like(temporal[:, 0]), _AROUND // 2
        frames = [temporal[:, t + frame] if t + frame >= 0 else blank for frame in self.frames]
        padded = [F.pad(frame, (0, 0, reach, reach, reach, reach)) for frame in frames]
        around = range(_AROUND)
        return torch.cat([f[:, y : y + height, x : x + width] for f in padded for y in around for x in around], -1)

    def frame(self, arithmetic: Arithmetic, temporal: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return frame t of the temporal stack, (B, H, W, dim), and its input to the vertical one, (B, H, W, 2 dim)."""
        assert self.temporal is not None
        assert self.on is not None
        found = arithmetic.linear(self._before(temporal, t), self.temporal.weight, self.temporal.bias)
        return _gate(arithmetic, found), arithmetic.linear(found, self.on.weight, self.on.bias)

    def row(
        self, arithmetic: Arithmetic, vertical: Tensor, told: Tensor, labels: Tensor, y: int
    ) -> tuple[Tensor, Tensor]:
        """Return row y of the vertical stack, (B, W, dim), and its input to the horizontal stack, (B, W, 2 dim).

        `told` is the input from the temporal stack, (B, W, 2 dim), zeros without one.
        """
        width, reach = vertical.shape[2], -self.columns[0]
        rows = [vertical[:, y + row] if y + row >= 0 else torch.zeros_like(vertical[:, 0]) for row in self.rows]
        padded = [F.pad(row, (0, 0, reach, reach)) for row in rows]
        above = torch.cat([row[:, column + reach :][:, :width] for row in padded for column in self.columns], -1)
        found = arithmetic.linear(above, self.vertical.weight, self.vertical.bias)
        found = found + arithmetic.constant(self.vertical_labels.weight)[labels][:, None] + told
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
