"""Factorized quantizer: codes of few dimensions, found by direction, behind projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.functional.quantize import lookup, quantize_errors, weighted
from fastvq.parts.arguments import check_not_negative
from fastvq.parts.factorized import FactorizedStage, nearest_direction
from fastvq.precision import at_least_float32, full_precision

from .learned_table import LearnedTable, TableRows


class FactorizedVQ(LearnedTable):
    """Quantizer in a space of few dimensions, whose codes are chosen by direction and put out as they are.

        z = project_in(x),   index = argmin_k |z / |z| - e_k / |e_k||^2,   quantized = project_out(e_index)
        loss = commitment_weight mean (z - sg[e_index])^2 + codebook_weight mean (sg[z] - e_index)^2

    The gradient of e_index passes straight through to z, and from there to both projections and x. The loss is zero in
    eval mode. It is a stage of `FactorizedResidualVQ`.

    Args:
        dim: dimension of the vectors.
        codebook_size: K.
        codebook_dim: D, dimension of the codes.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.
        commitment_weight, codebook_weight: of the losses. The defaults are those of DAC.

    State: embed (K, D), project_in, project_out, float32 in modules of any dtype.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: the search is exact (`fastvq.search`) for unit vectors computed in float32.

    Source: Yu et al., Vector-quantized Image Modeling with Improved VQGAN, 2021, section 3.2; raw codes and losses are
    those of Kumar et al., High-Fidelity Audio Compression with Improved RVQGAN (DAC), 2023, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int = 8,
        *,
        channel_first: bool = False,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
    ) -> None:
        check_not_negative(commitment_weight=commitment_weight, codebook_weight=codebook_weight)
        super().__init__(dim, codebook_size, codebook_dim=codebook_dim, channel_first=channel_first)
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.project_in, self.project_out = nn.Linear(dim, codebook_dim), nn.Linear(codebook_dim, dim)

    def weights(self, like: Tensor) -> FactorizedStage:
        """Return the weights in the dtype of a tensor."""
        into, back = self.project_in, self.project_out
        tensors = (into.weight, into.bias, back.weight, back.bias, self.embed)
        return FactorizedStage(*(tensor.to(like.dtype) for tensor in tensors))

    def nearest_rows(self, rows: Tensor, mask: Tensor) -> Tensor:
        with full_precision(rows):
            return self._nearest(self._project(self.project_in, at_least_float32(rows.detach())), mask)

    def quantize_rows(self, rows: Tensor, mask: Tensor) -> TableRows:
        with full_precision(rows):
            rows = at_least_float32(rows)
            found = self.quantize_latents(self._project(self.project_in, rows), mask)
            quantized = self._project(self.project_out, found.quantized)
            quantized = quantized.masked_fill((found.indices < 0).unsqueeze(-1), 0)
            return found._replace(quantized=quantized if self.training else quantized.detach())

    def quantize_latents(self, z: Tensor, mask: Tensor) -> TableRows:
        """Quantize projected rows (..., D) in the mask (...), without the projection back."""
        indices = self._nearest(z, mask)
        if not self.training:
            found = quantize_errors(z.detach(), self.embed.detach(), indices=indices)
            return TableRows(found.quantized, indices, torch.zeros_like(found.error), found.error)
        found = quantize_errors(z, self.embed, indices=indices)
        loss = weighted(found.error, self.commitment_weight) + weighted(found.codebook_error, self.codebook_weight)
        return TableRows(found.quantized, indices, loss, found.error)

    def codes_out(self, indices: Tensor) -> Tensor:
        with full_precision(self.embed):
            return self.project_out(lookup(self.embed, indices)).masked_fill((indices < 0).unsqueeze(-1), 0)

    def _nearest(self, z: Tensor, mask: Tensor) -> Tensor:
        rows = z.detach().flatten(0, -2).T[None]
        return nearest_direction(rows, self.embed, mask=mask.reshape(1, -1)).view(mask.shape)

    @staticmethod
    def _project(projection: nn.Linear, rows: Tensor) -> Tensor:
        """Return a projection of rows in their dtype, which may be float64."""
        return F.linear(rows, projection.weight.to(rows.dtype), projection.bias.to(rows.dtype))
