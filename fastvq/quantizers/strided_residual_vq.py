"""Residual quantizer of SNAC: stages at several rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvq.distributed import tie_parameters
from fastvq.parts.arguments import check_sizes, in_the_name_of
from fastvq.parts.indices import checked_indices
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import at_least_float32

from .factorized_residual_vq import FactorizedResidualVQ


class StridedResidualVQ(FactorizedResidualVQ):
    """Residual quantizer of sequences whose stages have strides in time: that of SNAC.

        r_0 = x,   q_s = repeat_s(FactorizedVQ_s(mean_s(r_s))),   r_{s+1} = r_s - q_s,   quantized = sum_s q_s

    mean_s averages over cells of as many positions as the stride of the stage, and repeat_s gives each of them the code
    of the cell. Positions that are masked out or not finite are left out of the averages; a cell without others gets
    index -1.

    Args:
        dim, codebook_size, codebook_dim: as for `FactorizedResidualVQ`.
        strides: of each stage. The length of a sequence must be a multiple of each.
        channel_first: sequences are (B, dim, T), else (B, T, dim).
        settings: the other arguments of `FactorizedResidualVQ`, without num_quantizers and stage_axis.

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
        **settings: Any,
    ) -> None:
        if not isinstance(strides, Sequence) or not strides:
            raise ValueError(f"strides: must be a sequence with a number for each stage, got {strides!r}")
        for stride in strides:
            check_sizes(strides=stride)
        for name in ("num_quantizers", "stage_axis"):
            if name in settings:
                raise TypeError(f"{name}: is not an argument of StridedResidualVQ, which has one stage for each stride")
        with in_the_name_of(self):
            super().__init__(dim, codebook_size, len(strides), codebook_dim, channel_first=channel_first, **settings)
        self.strides = tuple(strides)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Return (quantized, indices, losses) of x, as `FactorizedResidualVQ` does, for sequences alone.

        The indices are a tuple of int64 (B, T / stride), one for each stage.
        """
        layout = self._sequences(x)
        quantized, indices, losses = self._quantize(x, layout, layout.rows_mask(mask, lens), n_quantizers)
        return tie_parameters(self, (layout.from_rows(quantized.to(x.dtype)), tuple(indices), losses))

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]

    @torch.no_grad()
    def encode(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        layout = self._sequences(x)
        rows, rows_mask = exclude_non_finite(layout.to_rows(x), layout.rows_mask(mask, lens))
        active = self._active(n_quantizers, layout, x, training=False)
        return tuple(one.indices for one in self._search(at_least_float32(rows), rows_mask, active)[1])

    def get_output_from_indices(self, indices: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Return the quantized output of `forward`, without a mask, for (B, T / stride) of each stage, or the first."""
        given = list(indices)
        if not 1 <= len(given) <= self.num_quantizers:
            raise ValueError(f"indices: must be of 1 to {self.num_quantizers} stages, got {len(given)}")
        given = [checked_indices(one, self.codebook_size) for one in given]
        if any(one.dim() != 2 for one in given):
            raise ValueError(
                f"indices: must be (B, T / stride) for each stage, got {[tuple(one.shape) for one in given]}"
            )
        lengths = {one.shape[1] * stride for one, stride in zip(given, self.strides, strict=False)}
        if len(lengths) != 1:
            raise ValueError(f"indices: must be of sequences of one length, got lengths {sorted(lengths)}")
        return codes_in_layout(self._decode(given), self.channel_first)

    def _sequences(self, x: Tensor) -> Layout:
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, spatial=(1,), options=CHANNEL_FIRST)
        if layout.rows % math.lcm(*self.strides):
            raise ValueError(f"x: must have a length that the strides {self.strides} divide, got {layout.rows}")
        return layout
