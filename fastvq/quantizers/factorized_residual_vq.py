"""Residual quantizer of DAC: each stage projects the residual to a few dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.distributed import tie_parameters
from fastvq.functional.quantize import lookup
from fastvq.parts.dropout import ActiveStages
from fastvq.parts.factorized import factorized_output, factorized_search
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import at_least_float32, full_precision

from .factorized_vq import FactorizedVQ
from .learned_table import TableRows
from .residual import ResidualStack


class FactorizedResidualVQ(ResidualStack):
    """Residual quantizer whose stages each project the residual, and compare directions: that of DAC.

        r_0 = x,   quantized = sum_q FactorizedVQ_q(r_q),   r_{q+1} = r_q - FactorizedVQ_q(r_q)

    The gradient passes through the residuals, as in DAC. Vectors that are not finite get index -1 and a zero output,
    and take no part in losses and gradients. In eval mode, losses are zero and no gradient flows.

    Args:
        dim: dimension of the vectors.
        codebook_size: K of each stage.
        num_quantizers: Q, the number of stages.
        codebook_dim: D, dimension of the codes; or one for each stage.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.
        stage_axis: of the stages in indices: -1 for (B, ..., Q), 1 for (B, Q, ...), 0 for (Q, B, ...).
        quantize_dropout: in training, draw a number of leading stages for each item. DAC does so for half of the items:
            pass `n_quantizers` to do the like.
        commitment_weight, codebook_weight: of the losses of each stage. The defaults are those of DAC.

    State: layers, each a `FactorizedVQ`.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: all projections of residuals are one product (`fastvq.parts.factorized_search`), so that neither pass
    makes a residual of dim dimensions. The search of each stage is exact for its float32 latents.

    Source: Kumar et al., High-Fidelity Audio Compression with Improved RVQGAN, 2023, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_quantizers: int,
        codebook_dim: int | Sequence[int] = 8,
        *,
        channel_first: bool = False,
        stage_axis: int = -1,
        quantize_dropout: bool = False,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self._set_dropout(num_quantizers, quantize_dropout, 0, 1, per_item=True)
        self._set_stage_axis(stage_axis)
        dims = (codebook_dim,) * num_quantizers if isinstance(codebook_dim, int) else tuple(codebook_dim)
        if len(dims) != num_quantizers:
            raise ValueError(f"codebook_dim: must be one number, or {num_quantizers}, got {codebook_dim}")
        self.dim, self.channel_first = dim, channel_first
        self.strides = (1,) * num_quantizers
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

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, losses) of x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) if channel_first; any floating dtype.
            mask: bool (B, ...), True for the vectors that take part; the others get index -1 and zeros.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.
            n_quantizers: number of leading stages that take part, instead of a random one in training; or int (B,) with
                one for each item.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ..., Q), or with the stages at `stage_axis`, -1 for
            inactive stages; losses (Q,) float32.

        Raises:
            ValueError, TypeError: an invalid argument, by name.
        """
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        quantized, indices, losses = self._quantize(x, layout, layout.rows_mask(mask, lens), n_quantizers)
        found = self._stages_out(layout.indices(torch.stack(indices, -1)))
        return tie_parameters(self, (layout.from_rows(quantized.to(x.dtype)), found, losses))

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
    ) -> Tensor:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = exclude_non_finite(layout.to_rows(x), layout.rows_mask(mask, lens))
        active = self._active(n_quantizers, layout, x, training=False)
        _, found = self._search(at_least_float32(rows), rows_mask, active)
        return self._stages_out(layout.indices(torch.stack([one.indices for one in found], -1)))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return the quantized output of `forward` for these indices, or for those of the first stages alone."""
        indices = self._checked_stages(self._stages_last(indices))
        spatial = math.prod(indices.shape[1:-1])
        rows = indices.reshape(len(indices), spatial, indices.shape[-1])
        output = self._decode(rows.unbind(-1)).view(*indices.shape[:-1], self.dim)
        return codes_in_layout(output, self.channel_first)

    def reinitialize_(self) -> None:
        """Call `FactorizedVQ.reinitialize_` of every stage; projections stay."""
        for stage in self._stages:
            stage.reinitialize_()

    def _active(self, n_quantizers: int | Tensor | None, layout: Layout, x: Tensor, *, training: bool) -> ActiveStages:
        if n_quantizers is not None:
            return self._leading(n_quantizers, layout, x.device)
        return self._dropout.draw(training, x, items=layout.batch, rows=layout.rows)

    def _quantize(
        self, x: Tensor, layout: Layout, mask: Tensor | None, n_quantizers: int | Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return quantized rows (B, N, dim), the indices (B, N / stride) of each stage, and losses (Q,)."""
        self._warn_of_hooks()
        rows, mask = exclude_non_finite(layout.to_rows(x), mask)
        active = self._active(n_quantizers, layout, x, training=self.training)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            quantized, found = self._search(at_least_float32(rows), mask, active)
        if self.training or self._measures:
            for stage, one in zip(self._stages, found, strict=True):
                stage._health.observe_(one.indices, one.error)
        return quantized, [one.indices for one in found], torch.stack([one.loss for one in found]).float()

    def _search(self, rows: Tensor, mask: Tensor, active: ActiveStages) -> tuple[Tensor, list[TableRows]]:
        """Quantize rows (B, N, dim): return the sum of all stages, and the codes (B, N / stride, D) of each."""
        found: list[TableRows] = []

        def choose(place: int, latents: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor]:
            assert cells is not None
            if isinstance(active.number, Tensor):  # some items leave out this stage
                cells = cells & (active.number.view(mask.shape)[:, :: self.strides[place]] > place)
            found.append(self._stages[place].quantize_latents(latents.mT, cells))
            return found[-1].indices, found[-1].quantized.mT

        with full_precision(rows):
            stages = [stage.weights(rows) for place, stage in enumerate(self._stages) if not active.skips(place)]
            strides = self.strides[: len(stages)]
            result = factorized_search(rows.mT, stages, strides=strides, mask=mask, choose=choose)
            quantized = factorized_output(stages, result.indices, result.codes, strides=strides).mT
        if max(strides) > 1:  # a cell's code stands for its excluded positions too
            quantized = quantized.masked_fill(~mask.unsqueeze(-1), 0)
        for stride in self.strides[len(stages) :]:
            indices = torch.full_like(mask[:, ::stride], -1, dtype=torch.int64)
            zero = torch.zeros_like(found[0].error)
            found.append(TableRows(found[0].quantized, indices, zero, zero))
        return quantized, found

    def _decode(self, indices: Sequence[Tensor]) -> Tensor:
        """Return the sum (B, N, dim) of the outputs of stages with indices (B, N / stride)."""
        stages = [stage.weights(stage.embed) for stage in self._stages[: len(indices)]]
        codes = [lookup(stage.codes, one).transpose(1, 2) for stage, one in zip(stages, indices, strict=True)]
        with full_precision(stages[0].codes):
            output = factorized_output(stages, indices, codes, strides=self.strides[: len(indices)])
        return output.transpose(1, 2)
