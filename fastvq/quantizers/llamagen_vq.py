"""LlamaGen's quantizer: unit codes that learn by gradient, and an entropy loss on the distances."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.functional.quantize import quantize_errors, unit_norm, weighted
from fastvq.ops import search
from fastvq.parts.arguments import check_not_negative
from fastvq.parts.losses import entropy_loss
from fastvq.precision import at_least_float32

from .learned_table import LearnedTable, TableRows, check_entropy


class LlamaGenVQ(LearnedTable):
    """Quantizer of directions with a codebook that learns by gradient.

        x' = x / |x|,   e' = e / |e|,   index = argmin_k |x' - e'_k|^2,   quantized = e'_index
        loss = mean (sg[x'] - e'_index)^2 + commitment_weight mean (x' - sg[e'_index])^2
               + entropy_loss_weight (mean_n H(p_n) - H(mean_n p_n)),   p_n = softmax_k -|x'_n - e'_k|^2 / temperature

    The gradient of quantized passes straight through to x'. The loss is zero in eval mode. Vectors that are not finite
    get index -1 and a zero output, and take no part.

    Args:
        dim: dimension of the vectors and of the codes; 8 in LlamaGen.
        codebook_size: K.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.
        commitment_weight: beta.
        entropy_loss_weight, entropy_temperature: of the entropy loss; 0, as in LlamaGen's trainings, for none.

    State: embed (K, dim), a float32 parameter in modules of any dtype. Its rows may have any length.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: the search is exact (`fastvq.search`) for unit vectors computed in float32, by the inner product. Memory
    is O(N D + K D) and a tile, forward and backward, also of the entropy loss (`fastvq.soft_assign`).

    Source: Sun et al., Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation, 2024 (arXiv
    2406.06525), section 2.1; the entropy loss, with eps = 1e-5, is that of its code.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        channel_first: bool = False,
        commitment_weight: float = 0.25,
        entropy_loss_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        check_not_negative(commitment_weight=commitment_weight)
        check_entropy(entropy_loss_weight, entropy_temperature)
        super().__init__(dim, codebook_size, channel_first=channel_first)
        self.commitment_weight = commitment_weight
        self.entropy_loss_weight, self.entropy_temperature = entropy_loss_weight, entropy_temperature

    def _new_codes(self, noise: Tensor) -> Tensor:
        return unit_norm(noise)

    @property
    def codebook(self) -> Tensor:
        """The unit codes (K, dim), differentiable in embed."""
        return unit_norm(self.embed)

    def nearest_rows(self, rows: Tensor, mask: Tensor) -> Tensor:
        unit = unit_norm(at_least_float32(rows.detach())).flatten(0, -2)
        return search(unit, self.codebook.detach(), metric="dot", mask=mask.flatten()).view(mask.shape)

    def quantize_rows(self, rows: Tensor, mask: Tensor) -> TableRows:
        rows, codes = unit_norm(at_least_float32(rows)), self.codebook
        if not self.training:
            found = quantize_errors(rows.detach(), codes.detach(), metric="dot", mask=mask)
            return TableRows(found.quantized, found.indices, torch.zeros_like(found.error), found.error)
        found = quantize_errors(rows, codes, metric="dot", mask=mask)
        loss = found.codebook_error + weighted(found.error, self.commitment_weight)
        if isinstance(self.entropy_loss_weight, Tensor) or self.entropy_loss_weight:
            entropy = entropy_loss(rows, codes, temperature=self.entropy_temperature, eps=1e-5, mask=mask)
            loss = loss + weighted(entropy, self.entropy_loss_weight)
        return TableRows(found.quantized, found.indices, loss, found.error)
