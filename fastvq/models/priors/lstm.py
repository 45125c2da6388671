"""Recurrent prior along the raster order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .arithmetic import Arithmetic
from .base import Prior
from .inputs import Inputs, StageHeads, start_weights, zero_head

_State = tuple[tuple[Tensor, Tensor], list[list[Tensor]]]  # the state of `Inputs`, and (h, c) of each layer


class LSTMPrior(Prior):
    """Stack of LSTM layers over grids of indices in raster order, with the same inputs as the transformer.

        i, f, g, o = W x_t + U h_{t-1} + b;  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);  h_t = sigmoid(o) tanh(c_t)

    Args:
        codebook_size, grid, classes, label_dropout: see `Prior`.
        dim: width. depth: layers.
        dropout: in training, dropout on the input and on the output of each layer.
        vectors: (K, D), the code vectors, or those of each codebook, from which the weights are initialized so that
            similar codes start alike.

    Shapes: indices (B, *grid) int64 in [0, K); labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; with the forget gate of Gers et al., 2000.
    """

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        dim: int = 256,
        depth: int = 2,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        vectors: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        sizes = {"dim": dim, "depth": depth, "dropout": dropout}
        super().__init__(codebook_size, grid, classes=classes, label_dropout=label_dropout, **sizes)
        self.inputs = Inputs(self.sizes, self.grid, classes, dim, staged=self.staged)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(dim, dim, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.norm = nn.LayerNorm(dim)
        self.head = StageHeads(dim, self.sizes) if self.staged else zero_head(dim, self.sizes[0])
        if vectors is not None:
            start_weights(vectors, self.sizes, [e.weight for e in self.inputs.codes], self.head)

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        x = self.inputs(flat, self.rows_to_learn(labels, len(flat), flat.device))
        x, _ = self.lstm(self.dropout(x))
        hidden = self.norm(self.dropout(x))
        return self.head(hidden.unflatten(1, (-1, len(self.sizes))) if self.staged else hidden)

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> _State:
        begun = self.inputs.begin(arithmetic, labels)
        return begun, [[begun[1].new_zeros(begun[1].shape) for _ in range(2)] for _ in range(self.lstm.num_layers)]

    def step(self, arithmetic: Arithmetic, state: _State, indices: Tensor, place: int) -> Tensor:
        begun, layers = state
        x = self.inputs.at(arithmetic, begun, indices, place)
        for number, kept in enumerate(layers):
            w, u, b, d = (
                getattr(self.lstm, f"{name}_l{number}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            gates = arithmetic.linear(x, w, b) + arithmetic.linear(kept[0], u, d)
            i, f, g, o = gates.chunk(4, -1)
            new = arithmetic.multiply(arithmetic.sigmoid(i), arithmetic.tanh(g))
            kept[1] = arithmetic.multiply(arithmetic.sigmoid(f), kept[1]) + new
            x = kept[0] = arithmetic.multiply(arithmetic.sigmoid(o), arithmetic.tanh(kept[1]))
        hidden = arithmetic.norm(x, self.norm)
        if isinstance(self.head, StageHeads):
            return self.head.at(arithmetic, hidden, place % len(self.sizes))
        return arithmetic.linear(hidden, self.head.weight, self.head.bias)
