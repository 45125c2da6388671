"""Prior of a large transformer over positions and a small one over the stages of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic
from .base import Prior
from .inputs import DelayedInputs, StageHeads, first_codes, start_weights
from .transformer import Block, Cache


class DepthPrior(Prior):
    """Transformer over positions, and one over the stages of a position.

        h_t = transformer(indices of the positions before t, label)
        p(index of stage q at t) = depth(W h_t + s_q + sum_{r < q} code_r,   the same of the stages before q at t)

    The large transformer takes a step for each position, as in the delay pattern, and its attention does not grow with
    the number of stages. The small one attends to the stages of one position. In contrast to the delay pattern, an
    index is predicted from all stages before it at its position, and no position waits for another one.

    Args:
        codebook_size: a tuple with K of each stage.
        grid, classes, label_dropout: see `Prior`.
        dim: width. depth: blocks over the positions. heads: of each attention; they divide dim and stage_dim.
        stage_dim: width over the stages. stage_depth: blocks over them.
        dropout: in training, dropout on what each attention and perceptron adds.
        vectors: (K, D) of each codebook, from which the input and output weights are initialized, see
            `TransformerPrior`.

    Shapes: indices (B, *grid) int64 in [0, K), by place; labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Source: Lee et al., Autoregressive Image Generation using Residual Quantization, 2022, section 3.2, the
    RQ-Transformer; Défossez et al., Moshi, 2024, section 3.4.
    """

    in_stages = True

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        stage_dim: int = 64,
        stage_depth: int = 2,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        vectors: Sequence[Tensor] | None = None,
    ) -> None:
        own: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads, "dropout": dropout}
        own |= {"stage_dim": stage_dim, "stage_depth": stage_depth}
        super().__init__(codebook_size, grid, classes=classes, label_dropout=label_dropout, **own)
        if not self.staged:
            raise ValueError("kind: a depth prior takes several indices at each position; these have one")
        for name, width in (("dim", dim), ("stage_dim", stage_dim)):
            if width % heads:
                raise ValueError(f"heads: must divide {name}={width}, got {heads}")
        self.stages, self.first_codes = len(self.sizes), first_codes(self.sizes)
        self.inputs = DelayedInputs(self.sizes, self.grid, classes, dim, delay=0)
        self.blocks: Any = nn.ModuleList([Block(dim, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.to_stages = nn.Linear(dim, stage_dim)
        self.stage = nn.Embedding(self.stages, stage_dim)
        self.stage_codes = nn.Embedding(sum(self.sizes), stage_dim)
        for embedding in (self.stage, self.stage_codes):
            nn.init.normal_(embedding.weight, std=0.02)
        self.stage_blocks: Any = nn.ModuleList([Block(stage_dim, heads, dropout) for _ in range(stage_depth)])
        self.stage_norm = nn.LayerNorm(stage_dim)
        self.head = StageHeads(stage_dim, self.sizes)
        if vectors is not None:
            weights = [codes.weight for codes in (*self.inputs.codes, self.stage_codes)]
            start_weights(vectors, self.sizes, weights, self.head)

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = self.flattened(indices)
        x = self.inputs(flat, self.rows_to_learn(labels, len(flat), flat.device))
        for block in self.blocks:
            x = block(x)
        firsts = torch.tensor(self.first_codes, device=flat.device)
        codes = self.stage_codes(flat.unflatten(1, (-1, self.stages)) + firsts)  # [B, cells, Q, stage_dim]
        before = F.pad(codes[:, :, :-1].cumsum(2), (0, 0, 1, 0))
        y = self.to_stages(self.norm(x))[:, :, None] + self.stage.weight + before
        y, cells = y.flatten(0, 1), y.shape[1]
        for block in self.stage_blocks:
            y = block(y)
        return self.head(self.stage_norm(y).unflatten(0, (-1, cells)))

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> _State:
        begun = self.inputs.begin(arithmetic, labels)
        return _State(begun, [block.cache(begun[1], self.inputs.steps) for block in self.blocks])

    def step(self, arithmetic: Arithmetic, state: _State, indices: Tensor, place: int) -> Tensor:
        cell, stage = divmod(place, self.stages)
        if stage == 0:
            x = self.inputs.at(arithmetic, state.begun, indices, cell)
            for block, cache in zip(self.blocks, state.caches, strict=True):
                x = block.step(arithmetic, x, cache, cell)
            x = arithmetic.norm(x, self.norm)
            before = arithmetic.linear(x, self.to_stages.weight, self.to_stages.bias)
            state.stage_caches = [block.cache(before, self.stages) for block in self.stage_blocks]
        else:
            assert state.before is not None
            rows = indices[:, place - 1] + self.first_codes[stage - 1]
            before = state.before + arithmetic.constant(self.stage_codes.weight)[rows]
        state.before = before
        y = before + arithmetic.constant(self.stage.weight)[stage]
        for block, cache in zip(self.stage_blocks, state.stage_caches, strict=True):
            y = block.step(arithmetic, y, cache, stage)
        return self.head.at(arithmetic, arithmetic.norm(y, self.stage_norm), stage)


@dataclass
class _State:
    """State of the prior after some places."""

    begun: tuple[Tensor, Tensor]
    caches: list[Cache]
    before: Tensor | None = None  # (B, stage_dim), what the positions and the stages before this one say
    stage_caches: list[Cache] = field(default_factory=list)
