"""Residual quantizer of DAC: each stage projects the residual to a few dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvq.distributed import tie_parameters
from fastvq.parts.arguments import check_sizes
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout

from .factorized_stack import FactorizedStack


class FactorizedResidualVQ(FactorizedStack):
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
        check_sizes(num_quantizers=num_quantizers)
        super().__init__(
            dim,
            codebook_size,
            (1,) * num_quantizers,
            codebook_dim,
            channel_first=channel_first,
            quantize_dropout=quantize_dropout,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
        )
        self._set_stage_axis(stage_axis)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, losses) of x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) if channel_first; any floating dtype.
            mask: bool (B, ...), True for the vectors that take part; the others get index -1 and zeros.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.
            n_quantizers: number of leading stages that take part, instead of a random one in training; or int (B,) with
                one for each item.
            start: the first stage that takes part, for x that the stages before have left as residual; less than each
                number.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ..., Q), or with the stages at `stage_axis`, -1 for
            inactive stages; losses (Q,) float32.

        Raises:
            ValueError, TypeError: an invalid argument, by name.
        """
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        quantized, indices, losses = self._quantize(x, layout, layout.rows_mask(mask, lens), n_quantizers, start)
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
        start: int = 0,
    ) -> Tensor:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        found = self._indices(x, layout, layout.rows_mask(mask, lens), n_quantizers, start)
        return self._stages_out(layout.indices(torch.stack(found, -1)))

    def get_output_from_indices(
        self, indices: Tensor, *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the quantized output of `forward` for these indices, or for those of the first stages alone.

        n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        indices = self._checked_stages(self._chosen_stages(self._stages_last(indices), n_quantizers, start))
        spatial = math.prod(indices.shape[1:-1])
        rows = indices.reshape(len(indices), spatial, indices.shape[-1])
        output = self._decode(rows.unbind(-1)).view(*indices.shape[:-1], self.dim)
        return codes_in_layout(output, self.channel_first)
