"""Base of the residual quantizers whose stages project the residual."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastvq.functional.quantize import lookup
from fastvq.parts.arguments import check_sizes
from fastvq.parts.dropout import ActiveStages
from fastvq.parts.factorized import factorized_output, factorized_search
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.shapes import Layout
from fastvq.precision import at_least_float32, full_precision

from .factorized_vq import FactorizedVQ
from .learned_table import TableRows
from .residual import ResidualStack


class FactorizedStack(ResidualStack):
    """Base of residual quantizers of `FactorizedVQ`, for rows (B, N, dim) whose stages have strides.

    Args: see `FactorizedResidualVQ`; strides is one number for each stage.

    State: layers, each a `FactorizedVQ`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        strides: Sequence[int],
        codebook_dim: int | Sequence[int],
        *,
        channel_first: bool,
        quantize_dropout: bool,
        commitment_weight: float,
        codebook_weight: float,
    ) -> None:
        super().__init__()
        stages = len(strides)
        self._set_dropout(stages, quantize_dropout, 0, 1, per_item=True)
        dims = tuple(codebook_dim) if isinstance(codebook_dim, Sequence) else (codebook_dim,) * stages
        if len(dims) != stages:
            raise ValueError(f"codebook_dim: must be one number, or {stages}, got {codebook_dim}")
        for one in dims:
            check_sizes(codebook_dim=one)
        self.dim, self.channel_first, self.strides = dim, channel_first, tuple(strides)
        stage = partial(
            FactorizedVQ, dim, codebook_size, commitment_weight=commitment_weight, codebook_weight=codebook_weight
        )
        self.layers = nn.ModuleList([stage(one) for one in dims])

    @property
    def codebook_size(self) -> int:
        """K of each stage."""
        return self._stages[0].codebook_size

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """The codes (K, D) of each stage."""
        return tuple(stage.embed for stage in self._stages)

    def reinitialize_(self) -> None:
        """Call `FactorizedVQ.reinitialize_` of every stage; projections stay."""
        for stage in self._stages:
            stage.reinitialize_()

    def _quantize(
        self, x: Tensor, layout: Layout, mask: Tensor | None, n_quantizers: int | Tensor | None, start: int
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return quantized rows (B, N, dim), the indices (B, N / stride) of each stage, and losses (Q,)."""
        self._warn_of_hooks()
        rows, mask = exclude_non_finite(layout.to_rows(x), mask)
        active = self._active_stages(n_quantizers, start, layout, x, self.training)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            quantized, found = self._search(at_least_float32(rows), mask, active)
        if self.training or self._measures:
            for stage, one in zip(self._stages, found, strict=True):
                stage._health.observe_(one.indices, one.error)
        return quantized, [one.indices for one in found], torch.stack([one.loss for one in found]).float()

    def _indices(
        self, x: Tensor, layout: Layout, mask: Tensor | None, n_quantizers: int | Tensor | None, start: int
    ) -> list[Tensor]:
        """Return the indices (B, N / stride) of each stage, of `forward` in eval mode."""
        rows, mask = exclude_non_finite(layout.to_rows(x), mask)
        active = self._active_stages(n_quantizers, start, layout, x)
        return [one.indices for one in self._search(at_least_float32(rows), mask, active)[1]]

    def _search(self, rows: Tensor, mask: Tensor, active: ActiveStages) -> tuple[Tensor, list[TableRows]]:
        """Quantize rows (B, N, dim): return the sum of all stages, and what each of them has found."""
        active = active.shaped(mask.shape)
        places = [place for place in range(self.num_quantizers) if not active.skips(place)]
        strides = [self.strides[place] for place in places]
        found: dict[int, TableRows] = {}

        def choose(position: int, latents: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor]:
            assert cells is not None
            place = places[position]
            if isinstance(active.number, Tensor):  # some items leave out this stage
                cells = cells & (active.number[:, :: self.strides[place]] > place)
            found[place] = self._stages[place].quantize_latents(latents.mT, cells)
            return found[place].indices, found[place].quantized.mT

        with full_precision(rows):
            stages = [self._stages[place].weights(rows) for place in places]
            result = factorized_search(rows.mT, stages, strides=strides, mask=mask, choose=choose)
            quantized = factorized_output(stages, result.indices, result.codes, strides=strides).mT
        if max(strides) > 1:  # a cell's code stands for its excluded positions too
            quantized = quantized.masked_fill(~mask.unsqueeze(-1), 0)
        zero = torch.zeros_like(found[places[0]].error)
        for place, stride in enumerate(self.strides):
            if place not in found:
                absent = torch.full_like(mask[:, ::stride], -1, dtype=torch.int64)
                found[place] = TableRows(quantized, absent, zero, zero)
        return quantized, [found[place] for place in range(self.num_quantizers)]

    def _decode(self, indices: Sequence[Tensor]) -> Tensor:
        """Return the sum (B, N, dim) of the outputs of stages with indices (B, N / stride)."""
        stages = [stage.weights(stage.embed) for stage in self._stages[: len(indices)]]
        codes = [lookup(stage.codes, one).transpose(1, 2) for stage, one in zip(stages, indices, strict=True)]
        with full_precision(stages[0].codes):
            output = factorized_output(stages, indices, codes, strides=self.strides[: len(indices)])
        return output.transpose(1, 2)
