"""LlamaGen's quantizer: unit codes that learn by gradient, and an entropy loss on the distances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored
from fastvq.distributed import common_seed
from fastvq.functional.quantize import lookup, quantize_errors, unit_norm, weighted
from fastvq.parts.arguments import check_not_negative, check_sizes
from fastvq.parts.indices import checked_indices
from fastvq.parts.losses import entropy_loss
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import KeepsPrecision


class LlamaGenVQ(Monitored, KeepsPrecision, nn.Module):
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
        super().__init__()
        check_sizes(dim=dim, codebook_size=codebook_size)
        check_not_negative(commitment_weight=commitment_weight, entropy_loss_weight=entropy_loss_weight)
        if not entropy_temperature > 0:
            raise ValueError(f"entropy_temperature: must be positive, got {entropy_temperature}")
        self.dim, self.codebook_dim, self.codebook_size = dim, dim, codebook_size
        self.channel_first, self.commitment_weight = channel_first, commitment_weight
        self.entropy_loss_weight, self.entropy_temperature = entropy_loss_weight, entropy_temperature
        self.embed = nn.Parameter(unit_norm(torch.randn(codebook_size, dim, dtype=torch.float32)))
        self._health = Health(codebook_size)

    @property
    def codebook(self) -> Tensor:
        """The unit codes (K, dim), differentiable in embed."""
        return unit_norm(self.embed)

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Draw a new codebook and reset the health. With several ranks all must call this, and get the same codes."""
        generator = torch.Generator("cpu").manual_seed(common_seed(2**63 - 1))
        self.embed.copy_(unit_norm(torch.randn(self.embed.shape, generator=generator, device="cpu")))
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
        rows, codes = unit_norm(rows if rows.dtype == torch.float64 else rows.float()), self.codebook
        if not self.training:
            rows, codes = rows.detach(), codes.detach()
        found = quantize_errors(rows, codes, metric="dot", mask=rows_mask)
        if self.training or self._measures:
            self._health.observe_(found.indices, found.error)
        loss = found.codebook_error + weighted(found.error, self.commitment_weight)
        if isinstance(self.entropy_loss_weight, Tensor) or self.entropy_loss_weight:
            entropy = entropy_loss(rows, codes, temperature=self.entropy_temperature, eps=1e-5, mask=rows_mask)
            loss = loss + weighted(entropy, self.entropy_loss_weight)
        loss = loss if self.training else torch.zeros_like(found.error)
        return layout.from_rows(found.quantized.to(x.dtype)), layout.indices(found.indices), loss

    if TYPE_CHECKING:
        __call__ = forward

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes of indices (B, ...), zeros for -1: (B, ..., dim), or (B, dim, ...) if channel_first."""
        return codes_in_layout(lookup(self.codebook, checked_indices(indices, self.codebook_size)), self.channel_first)
