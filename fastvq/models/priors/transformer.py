"""Prior that attends to all previous indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic
from .base import Prior
from .inputs import DelayedInputs, Inputs, StageHeads, start_weights, zero_head

PATTERNS = ("flat", "delay")
Cache = list[Tensor]  # keys and values (B, heads, places, D) of a block, filled up to the known places


class TransformerPrior(Prior):
    """Decoder-only transformer over grids of indices in raster order, with or without classes.

    Each place is given the index before it and, in grids of two or three axes, those above it and above to the right
    (`Inputs`): attention could find these neighbors by itself, but takes longer to learn it. Blocks are
    pre-normalized: causal attention, then a perceptron four times as wide.

    Several indices at each position are flattened, or follow in the delay pattern: step s takes the indices of all
    codebooks q at positions s - q, from those of the steps before. A step predicts them independently of each other,
    and a sample takes positions + Q - 1 steps instead of positions times Q.

    Args:
        codebook_size, grid, classes, label_dropout: see `Prior`.
        dim: width. depth: blocks. heads: of each attention; they divide dim.
        dropout: in training, dropout on what each attention and perceptron adds.
        vectors: (K, D), the code vectors, or those of each codebook: if given, the input and output weights are
            initialized from them, so that similar codes start alike and less must be learned. Otherwise an untrained
            prior is uniform.
        pattern: order of several indices at a position, "flat" or "delay".

    Shapes: indices (B, *grid) int64 in [0, K), by place for several; labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Attributes:
        prefix: number of steps before those of the grid, which a subclass may have.

    Source: Vaswani et al., Attention Is All You Need, 2017; the delay pattern: Copet et al., Simple and Controllable
    Music Generation (MusicGen), 2023, section 2.2; see `Prior` for the others.
    """

    prefix = 0

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        vectors: Tensor | Sequence[Tensor] | None = None,
        pattern: str = "flat",
    ) -> None:
        sizes: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads, "dropout": dropout}
        # Fingerprints of priors cover their settings: those of earlier ones have no pattern.
        sizes |= {} if pattern == "flat" else {"pattern": pattern}
        super().__init__(codebook_size, grid, classes=classes, label_dropout=label_dropout, **sizes)
        if dim % heads:
            raise ValueError(f"heads: must divide dim={dim}, got {heads}")
        if pattern not in PATTERNS:
            raise ValueError(f"pattern: must be one of {', '.join(PATTERNS)}, got {pattern!r}")
        if pattern == "delay" and not self.staged:
            raise ValueError("pattern: 'delay' is for several indices at each position, these have one: use 'flat'")
        self.delayed = pattern == "delay"
        self.inputs: Inputs | DelayedInputs
        if self.delayed:
            self.inputs = DelayedInputs(self.sizes, self.grid, classes, dim)
            self.order = self.inputs.order
        else:
            self.inputs = Inputs(self.sizes, self.grid, classes, dim, staged=self.staged)
        self.blocks: Any = nn.ModuleList([Block(dim, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = StageHeads(dim, self.sizes) if self.staged else zero_head(dim, self.sizes[0])
        if vectors is not None:
            start_weights(vectors, self.sizes, [e.weight for e in self.inputs.codes], self.head)

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        return self.predict(self.hidden(self.inputs(flat, self.rows_to_learn(labels, len(flat), flat.device))))

    def hidden(self, x: Tensor) -> Tensor:
        """Return the features (B, steps, dim) after all blocks of the inputs of all steps."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def predict(self, hidden: Tensor) -> Tensor:
        """Return logits (B, places, K) of the features (B, steps, dim) of the steps of the grid."""
        stages = len(self.sizes)
        if self.delayed:
            cells = self.places // stages
            hidden = torch.stack([hidden[:, stage : stage + cells] for stage in range(stages)], 2)
        elif self.staged:
            hidden = hidden.unflatten(1, (-1, stages))
        return self.head(hidden)

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> State:
        begun = self.inputs.begin(arithmetic, labels)
        return State(begun, [block.cache(begun[1], self.prefix + self.inputs.steps) for block in self.blocks])

    def advance(self, arithmetic: Arithmetic, x: Tensor, state: State, number: int) -> Tensor:
        """Return the features (B, dim) after all blocks of the inputs of step `number`, those of the prefix counted."""
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block.step(arithmetic, x, cache, number)
        return x

    def step(self, arithmetic: Arithmetic, state: State, indices: Tensor, place: int) -> Tensor:
        stage = place % len(self.sizes)
        step = self.inputs.step_of(place) if isinstance(self.inputs, DelayedInputs) else place
        if step != state.step:
            x = self.inputs.at(arithmetic, state.begun, indices, step)
            x = self.advance(arithmetic, x, state, self.prefix + step)
            state.step, state.hidden = step, arithmetic.norm(x, self.norm)
        assert state.hidden is not None
        if isinstance(self.head, StageHeads):
            return self.head.at(arithmetic, state.hidden, stage)
        return arithmetic.linear(state.hidden, self.head.weight, self.head.bias)


@dataclass
class State:
    """State of a transformer after some steps."""

    begun: tuple[Tensor, Tensor]
    caches: list[Cache]
    step: int = -1
    hidden: Tensor | None = None  # (B, dim), the features of this step, from which each stage is predicted


class Block(nn.Module):
    """Pre-normalized block of a transformer: attention, then a perceptron four times as wide."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the block to x (B, places, dim); place i attends to j where mask (i, j) is true, by default up to i."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.mlp_norm(x)))))

    def cache(self, like: Tensor, places: int) -> Cache:
        """Allocate the keys and values of a batch of vectors (B, dim)."""
        return [like.new_zeros(len(like), self.heads, places, like.shape[1] // self.heads) for _ in range(2)]

    def step(self, arithmetic: Arithmetic, x: Tensor, cache: Cache, place: int) -> Tensor:
        """Apply the block to x (B, dim) at one place after those in the cache."""
        return self.extend(arithmetic, x[:, None], cache, place)[:, 0]

    def extend(self, arithmetic: Arithmetic, x: Tensor, cache: Cache, first: int) -> Tensor:
        """Apply the block to x (B, n, dim) at n places from `first` on, which see each other and those in the cache."""
        normed = arithmetic.norm(x, self.attention_norm)
        qkv = arithmetic.linear(normed, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        end = first + x.shape[1]
        for kept, new in zip(cache, (k, v), strict=True):
            kept[:, :, first:end] = new
        keys, values = (kept[:, :, :end] for kept in cache)
        attended = arithmetic.attend(q, keys, values).transpose(1, 2).flatten(2)
        x = x + arithmetic.linear(attended, self.out.weight, self.out.bias)
        hidden = arithmetic.linear(arithmetic.norm(x, self.mlp_norm), self.widen.weight, self.widen.bias)
        return x + arithmetic.linear(arithmetic.gelu(hidden), self.narrow.weight, self.narrow.bias)
