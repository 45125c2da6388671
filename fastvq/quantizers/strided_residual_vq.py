"""Residual quantizer of SNAC: stages at several rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvq.distributed import tie_parameters
from fastvq.parts.arguments import check_sizes
from fastvq.parts.dropout import ActiveStages
from fastvq.parts.indices import checked_indices
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, Options, codes_in_layout

from .factorized_stack import FactorizedStack

SEQUENCES: Options = {layout: option for layout, option in CHANNEL_FIRST.items() if layout[1] == 1}


class StridedResidualVQ(FactorizedStack):
    """Residual quantizer of sequences whose stages have strides in time: that of SNAC.

        r_0 = x,   q_s = repeat_s(FactorizedVQ_s(mean_s(r_s))),   r_{s+1} = r_s - q_s,   quantized = sum_s q_s

    mean_s averages over cells of as many positions as the stride of the stage, and repeat_s gives each of them the code
    of the cell. Positions that are masked out or not finite are left out of the averages; a cell without others gets
    index -1.

    Args:
        dim, codebook_size, codebook_dim: as for `FactorizedResidualVQ`.
        strides: of each stage. The length of a sequence must be a multiple of each.
        channel_first: sequences are (B, dim, T), else (B, T, dim).
        quantize_dropout, commitment_weight, codebook_weight: as for `FactorizedResidualVQ`.

    State, Raises, Numerics: as for `FactorizedResidualVQ`.

    Source: Siuzdak et al., SNAC: Multi-Scale Neural Audio Codec, 2024, section 3.1. SNAC itself has no losses here.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        strides: Sequence[int],
        codebook_dim: int | Sequence[int] = 8,
        *,
        channel_first: bool = False,
        quantize_dropout: bool = False,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
    ) -> None:
        if not isinstance(strides, Sequence) or not strides:
            raise ValueError(f"strides: must be a sequence with a number for each stage, got {strides!r}")
        for stride in strides:
            check_sizes(strides=stride)
        super().__init__(
            dim,
            codebook_size,
            strides,
            codebook_dim,
            channel_first=channel_first,
            quantize_dropout=quantize_dropout,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Return (quantized, indices, losses) of x, as `FactorizedResidualVQ` does, for sequences alone.

        The indices are a tuple of int64 (B, T / stride), one for each stage.
        """
        layout = self._sequences(x)
        quantized, indices, losses = self._quantize(x, layout, layout.rows_mask(mask, lens), n_quantizers, start)
        return tie_parameters(self, (layout.from_rows(quantized.to(x.dtype)), tuple(indices), losses))

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
    ) -> tuple[Tensor, ...]:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        layout = self._sequences(x)
        return tuple(self._indices(x, layout, layout.rows_mask(mask, lens), n_quantizers, start))

    def get_output_from_indices(
        self, indices: Sequence[Tensor], *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the quantized output of `forward`, without a mask, for (B, T / stride) of each stage, or the first.

        n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        if not isinstance(indices, Sequence | Tensor):
            raise TypeError(f"indices: must be a sequence of tensors, got {type(indices).__name__}")
        given = list(indices)
        if not 1 <= len(given) <= self.num_quantizers:
            raise ValueError(f"indices: must be of 1 to {self.num_quantizers} stages, got {len(given)}")
        given = [checked_indices(one, self.codebook_size) for one in given]
        if any(one.dim() != 2 for one in given):
            raise ValueError(
                f"indices: must be (B, T / stride) for each stage, got {[tuple(one.shape) for one in given]}"
            )
        if len({len(one) for one in given}) != 1:
            raise ValueError(f"indices: must be of one batch size, got {[len(one) for one in given]}")
        lengths = {one.shape[1] * stride for one, stride in zip(given, self.strides, strict=False)}
        if len(lengths) != 1:
            raise ValueError(f"indices: must be of sequences of one length, got lengths {sorted(lengths)}")
        active = ActiveStages.of_call(n_quantizers, start, items=given[0].shape[0], stages=len(given))
        if isinstance(active.number, Tensor):
            active = active._replace(number=active.number.to(given[0].device)[:, None])
        given = [active.fill(place, one, -1) for place, one in enumerate(given)]
        return codes_in_layout(self._decode(given), self.channel_first)

    def _sequences(self, x: Tensor) -> Layout:
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, spatial=(1,), options=SEQUENCES)
        if layout.rows % math.lcm(*self.strides):
            raise ValueError(f"x: must have a length that the strides {self.strides} divide, got {layout.rows}")
        return layout
