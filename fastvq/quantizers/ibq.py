"""Index backpropagation quantization: the gradient of the choice reaches all codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype, half_difference
from fastvq.functional.quantize import quantize_errors, weighted
from fastvq.functional.soft_assign import soft_lookup
from fastvq.ops import search
from fastvq.parts.arguments import check_not_negative
from fastvq.parts.losses import entropy_loss

from .learned_table import LearnedTable, TableRows, check_entropy


class IBQ(LearnedTable):
    """Quantizer by the largest inner product, with a gradient for all codes.

        p = softmax_k <x, e_k>,   index = argmax_k <x, e_k>,   quantized = sum_k (onehot_k + p_k - sg[p_k]) e_k
        loss = mean (quantized - x)^2 + mean (sg[e_index] - x)^2 + beta mean (sg[x] - e_index)^2
               + entropy_loss_weight (mean_n H(p'_n) - H(mean_n p'_n)),   p' = softmax_k <x, e_k> / entropy_temperature

    The value of quantized is e_index. Since its gradient reaches every code by p, large codebooks don't collapse. The
    loss is zero in eval mode. Vectors that are not finite get index -1 and a zero output, and take no part.

    Args:
        dim: dimension of the vectors and of the codes.
        codebook_size: K.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.
        beta: weight of the codebook loss.
        entropy_loss_weight, entropy_temperature: of the entropy loss; 0 for none.

    State: embed (K, dim), a float32 parameter in modules of any dtype.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: the choice is exact (`fastvq.search`). Memory is O(N D + K D) and a tile, forward and backward: p is never
    a matrix (`fastvq.soft_lookup`, `fastvq.soft_assign`).

    Source: Shi et al., Scalable Image Tokenization with Index Backpropagation Quantization, 2024 (arXiv 2412.02692);
    losses, eps = 1e-5 of the entropy and defaults are those of its published code, whose weight of the entropy loss
    stands in its configurations.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        channel_first: bool = False,
        beta: float = 0.25,
        entropy_loss_weight: float = 0.05,
        entropy_temperature: float = 0.01,
    ) -> None:
        check_not_negative(beta=beta)
        check_entropy(entropy_loss_weight, entropy_temperature)
        super().__init__(dim, codebook_size, channel_first=channel_first)
        self.beta = beta
        self.entropy_loss_weight, self.entropy_temperature = entropy_loss_weight, entropy_temperature

    def nearest_rows(self, rows: Tensor, mask: Tensor) -> Tensor:
        found = search(rows.detach().flatten(0, -2), self.embed.detach(), metric="dot", mask=mask.flatten())
        return found.view(mask.shape)

    def quantize_rows(self, rows: Tensor, mask: Tensor) -> TableRows:
        indices = self.nearest_rows(rows, mask)
        hard = quantize_errors(rows, self.embed, metric="dot", indices=indices)
        if not self.training:
            return TableRows(hard.quantized.detach(), indices, torch.zeros_like(hard.error), hard.error)
        quantized = soft_lookup(rows, self.embed, indices, metric="dot")
        half = half_difference(rows, quantized.to(compute_dtype(rows, self.embed)), mask.unsqueeze(-1))
        soft_error = 4 * half.square().sum() / (mask.sum() * self.dim).clamp_min(1)
        loss = soft_error + hard.error + weighted(hard.codebook_error, self.beta)
        if isinstance(self.entropy_loss_weight, Tensor) or self.entropy_loss_weight:
            entropy = entropy_loss(
                rows, self.embed, metric="dot", temperature=self.entropy_temperature, eps=1e-5, mask=mask
            )
            loss = loss + weighted(entropy, self.entropy_loss_weight)
        return TableRows(quantized, indices, loss, hard.error)
