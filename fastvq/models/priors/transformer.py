"""Prior that attends to all previous indices."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic
from .base import Prior
from .inputs import Inputs, start_from, zero_head

_Cache = list[Tensor]  # keys and values (B, heads, places, D) of a block, filled up to the known places


class TransformerPrior(Prior):
    """Decoder-only transformer over grids of indices in raster order, with or without classes.

    Each place is given the index before it and, in grids of two or three axes, those above it and above to the right
    (`Inputs`): attention could find these neighbors by itself, but takes longer to learn it. Blocks are
    pre-normalized: causal attention, then a perceptron four times as wide.

    Args:
        codebook_size, grid, classes, label_dropout: see `Prior`.
        dim: width. depth: blocks. heads: of each attention; they divide dim.
        dropout: in training, dropout on what each attention and perceptron adds.
        vectors: (K, D), the code vectors: if given, the input and output weights are initialized from them, so that
            similar codes start alike and less must be learned. Otherwise an untrained prior is uniform.

    Shapes: indices (B, *grid) int64 in [0, K); labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Source: Vaswani et al., Attention Is All You Need, 2017; see `Prior` for the others.
    """

    def __init__(
        self,
        codebook_size: int,
        grid: tuple[int, ...],
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        vectors: Tensor | None = None,
    ) -> None:
        sizes = {"dim": dim, "depth": depth, "heads": heads, "dropout": dropout}
        super().__init__(codebook_size, grid, classes=classes, label_dropout=label_dropout, **sizes)
        if dim % heads:
            raise ValueError(f"heads: must divide dim={dim}, got {heads}")
        self.inputs = Inputs(codebook_size, self.grid, classes, dim)
        self.blocks: Any = nn.ModuleList([_Block(dim, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = zero_head(dim, codebook_size)
        if vectors is not None:
            start_from(vectors, codebook_size, [e.weight for e in self.inputs.codes], [self.head.weight])

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        x = self.inputs(flat, self.rows_to_learn(labels, len(flat), flat.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> tuple[tuple[Tensor, Tensor], list[_Cache]]:
        begun = self.inputs.begin(arithmetic, labels)
        return begun, [block.cache(begun[1], self.places) for block in self.blocks]

    def step(
        self, arithmetic: Arithmetic, state: tuple[tuple[Tensor, Tensor], list[_Cache]], indices: Tensor, place: int
    ) -> Tensor:
        begun, caches = state
        x = self.inputs.at(arithmetic, begun, indices, place)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(arithmetic, x, cache, place)
        return arithmetic.linear(arithmetic.norm(x, self.norm), self.head.weight, self.head.bias)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x (B, places, dim)."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.mlp_norm(x)))))

    def cache(self, like: Tensor, places: int) -> _Cache:
        """Allocate the keys and values of a batch of vectors (B, dim)."""
        return [like.new_zeros(len(like), self.heads, places, like.shape[1] // self.heads) for _ in range(2)]

    def step(self, arithmetic: Arithmetic, x: Tensor, cache: _Cache, place: int) -> Tensor:
        """Apply the block to x (B, dim) at one place after those in the cache."""
        normed = arithmetic.norm(x, self.attention_norm)
        qkv = arithmetic.linear(normed, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.heads, -1))
        for kept, new in zip(cache, (qkv[:, 1], qkv[:, 2]), strict=True):
            kept[:, :, place] = new
        keys, values = (kept[:, :, : place + 1] for kept in cache)
        attended = arithmetic.attend(qkv[:, 0, :, None], keys, values)[:, :, 0].flatten(1)
        x = x + arithmetic.linear(attended, self.out.weight, self.out.bias)
        hidden = arithmetic.linear(arithmetic.norm(x, self.mlp_norm), self.widen.weight, self.widen.bias)
        return x + arithmetic.linear(arithmetic.gelu(hidden), self.narrow.weight, self.narrow.bias)
