"""Index backpropagation quantization: the gradient of the choice reaches all codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.backends.arithmetic import compute_dtype
from fastvq.codebook.health import Health, Monitored
from fastvq.distributed import common_seed
from fastvq.functional.quantize import lookup, quantize_errors, weighted
from fastvq.functional.soft_assign import soft_lookup
from fastvq.ops import search
from fastvq.parts.arguments import check_not_negative, check_sizes
from fastvq.parts.indices import checked_indices
from fastvq.parts.losses import entropy_loss
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import KeepsPrecision


class IBQ(Monitored, KeepsPrecision, nn.Module):
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
        super().__init__()
        check_sizes(dim=dim, codebook_size=codebook_size)
        check_not_negative(beta=beta, entropy_loss_weight=entropy_loss_weight)
        if not entropy_temperature > 0:
            raise ValueError(f"entropy_temperature: must be positive, got {entropy_temperature}")
        self.dim, self.codebook_dim, self.codebook_size = dim, dim, codebook_size
        self.channel_first, self.beta = channel_first, beta
        self.entropy_loss_weight, self.entropy_temperature = entropy_loss_weight, entropy_temperature
        self.embed = nn.Parameter(torch.randn(codebook_size, dim, dtype=torch.float32))
        self._health = Health(codebook_size)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, dim)."""
        return self.embed

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Draw a new codebook and reset the health. With several ranks all must call this, and get the same codes."""
        generator = torch.Generator("cpu").manual_seed(common_seed(2**63 - 1))
        self.embed.copy_(torch.randn(self.embed.shape, generator=generator, device="cpu"))
        self.reset_health()

    @torch.no_grad()
    def _non_finite(self) -> Tensor:
        return 1 - self.embed.isfinite().all(-1).float().mean()

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, loss) of x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) if channel_first; any floating dtype.
            mask: bool (B, ...), True for the vectors that take part; the others get index -1 and zeros.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ...); loss () float32.

        Raises:
            ValueError, TypeError: x of another shape or dtype.
        """
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = exclude_non_finite(layout.to_rows(x), layout.rows_mask(mask, lens))
        indices = search(rows.detach().flatten(0, -2), self.embed.detach(), metric="dot").view(rows.shape[:-1])
        indices = indices.masked_fill(~rows_mask, -1)
        hard = quantize_errors(rows, self.embed, metric="dot", indices=indices)
        if self.training or self._measures:
            self._health.observe_(indices, hard.error)
        if not self.training:
            return (
                layout.from_rows(hard.quantized.detach().to(x.dtype)),
                layout.indices(indices),
                torch.zeros_like(hard.error),
            )
        quantized = soft_lookup(rows, self.embed, indices, metric="dot")
        dtype = compute_dtype(rows, self.embed)
        difference = (quantized.to(dtype) - rows.to(dtype)).masked_fill(~rows_mask.unsqueeze(-1), 0)
        soft_error = difference.square().sum() / (rows_mask.sum() * self.dim).clamp_min(1)
        loss = soft_error + hard.error + weighted(hard.codebook_error, self.beta)
        if isinstance(self.entropy_loss_weight, Tensor) or self.entropy_loss_weight:
            entropy = entropy_loss(
                rows, self.embed, metric="dot", temperature=self.entropy_temperature, eps=1e-5, mask=rows_mask
            )
            loss = loss + weighted(entropy, self.entropy_loss_weight)
        return layout.from_rows(quantized.to(x.dtype)), layout.indices(indices), loss

    if TYPE_CHECKING:
        __call__ = forward

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes of indices (B, ...), zeros for -1: (B, ..., dim), or (B, dim, ...) if channel_first."""
        return codes_in_layout(lookup(self.embed, checked_indices(indices, self.codebook_size)), self.channel_first)
