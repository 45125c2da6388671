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
from fastvq.parts.factorized import factorized_output, factorized_search, pooled, repeated
from fastvq.parts.losses import mean_squared_errors
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import at_least_float32, full_precision

from .factorized_vq import FactorizedVQ
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

    Numerics: in eval mode all projections of residuals are one product (`fastvq.parts.factorized_search`): in 1,024
    dimensions the stages take a fraction of the time of a loop. Rounding may then choose another of two codes that are
    about equally near than it does in training.

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
        _, indices, _ = self._search(at_least_float32(rows), rows_mask, active)
        return self._stages_out(layout.indices(torch.stack(indices, -1)))

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
        rows = at_least_float32(rows)
        active = self._active(n_quantizers, layout, x, training=self.training)
        if self.training:
            quantized, indices, losses, errors = self._quantize_by_stage(rows, mask, active)
        else:
            quantized, indices, errors = self._search(rows.detach(), mask, active)
            losses = torch.zeros_like(errors)
        if self.training or self._measures:
            for stage, one, error in zip(self._stages, indices, errors, strict=True):
                stage._health.observe_(one, error)
        return quantized, indices, losses

    def _quantize_by_stage(
        self, rows: Tensor, mask: Tensor, active: ActiveStages
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Quantize rows (B, N, dim) with gradients; also return the errors (Q,) of the stages."""
        residual, total = rows, torch.zeros_like(rows)
        indices, losses, errors = [], [], []
        for place, (stage, stride) in enumerate(zip(self._stages, self.strides, strict=True)):
            own_mask = self._stage_mask(place, mask, active)
            cells, cells_mask = pooled(residual.transpose(1, 2), stride, own_mask)
            assert cells_mask is not None
            found = stage.quantize_rows(cells.transpose(1, 2), cells_mask)
            output = repeated(found.quantized.transpose(1, 2), stride).transpose(1, 2)
            output = output.masked_fill(~own_mask.unsqueeze(-1), 0)
            residual, total = residual - output, total + output
            indices.append(found.indices)
            losses.append(found.loss)
            errors.append(found.error)
        return total, indices, torch.stack(losses), torch.stack(errors)

    @torch.no_grad()
    def _search(self, rows: Tensor, mask: Tensor, active: ActiveStages) -> tuple[Tensor, list[Tensor], Tensor]:
        """Quantize rows (B, N, dim) without gradients: quantized, the indices of each stage, and errors (Q,)."""
        stages = [stage.weights(rows) for place, stage in enumerate(self._stages) if not active.skips(place)]
        strides = self.strides[: len(stages)]
        with full_precision(rows):
            found = factorized_search(rows.transpose(1, 2), stages, strides=strides, mask=mask)
        indices, codes, errors = [], [], []
        for place, (stride, chosen) in enumerate(zip(strides, found.indices, strict=True)):
            if isinstance(active.number, Tensor):  # some items leave out this stage
                chosen = chosen.masked_fill(active.number.view(mask.shape)[:, ::stride] <= place, -1)
            indices.append(chosen)
            codes.append(found.codes[place].masked_fill((chosen < 0)[:, None], 0))
            error = mean_squared_errors(found.latents[place].mT, codes[-1].mT, chosen).sum()
            errors.append(error / (chosen >= 0).sum().clamp_min(1))
        with full_precision(rows):
            quantized = factorized_output(stages, indices, codes, strides=strides).masked_fill(~mask[:, None], 0)
        for stride in self.strides[len(stages) :]:
            indices.append(torch.full_like(mask[:, ::stride], -1, dtype=torch.int64))
            errors.append(quantized.new_zeros(()))
        return quantized.transpose(1, 2), indices, torch.stack(errors).float()

    def _decode(self, indices: Sequence[Tensor]) -> Tensor:
        """Return the sum (B, N, dim) of the outputs of stages with indices (B, N / stride)."""
        stages = [stage.weights(stage.embed) for stage in self._stages[: len(indices)]]
        codes = [lookup(stage.codes, one).transpose(1, 2) for stage, one in zip(stages, indices, strict=True)]
        with full_precision(stages[0].codes):
            output = factorized_output(stages, indices, codes, strides=self.strides[: len(indices)])
        return output.transpose(1, 2)

    @staticmethod
    def _stage_mask(place: int, mask: Tensor, active: ActiveStages) -> Tensor:
        """Return the mask (B, N) of the rows that a stage quantizes."""
        if isinstance(active.number, int):
            return mask if place < active.number else torch.zeros_like(mask)
        return mask & (active.number.view(mask.shape) > place)
