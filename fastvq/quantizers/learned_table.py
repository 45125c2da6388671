"""Base of quantizers with one table of codes that learns by gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored
from fastvq.distributed import common_seed
from fastvq.functional.quantize import check_some_code, lookup
from fastvq.parts.arguments import check_not_negative, check_sizes
from fastvq.parts.indices import checked_indices
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import KeepsPrecision


class TableRows(NamedTuple):
    """Result of `LearnedTable.quantize_rows`."""

    quantized: Tensor  # (..., dim), zero for excluded rows
    indices: Tensor  # (...) int64
    loss: Tensor  # () float32, or float64 for float64 rows, with its weights; zero in eval mode
    error: Tensor  # (), of that dtype, the mean squared error per element, without gradient


class LearnedTable(Monitored, KeepsPrecision, nn.Module):
    """Base of quantizers whose codes (K, D) are a parameter.

    A subclass implements `nearest_rows` and `quantize_rows`. Vectors that are not finite get index -1 and a zero
    output, and take no part in losses and gradients.

    Args:
        dim: dimension of the vectors.
        codebook_size: K.
        codebook_dim: D, dimension of the codes; dim by default.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.

    State: embed (K, D), float32 in modules of any dtype, as all parameters of the module.
    """

    def __init__(
        self, dim: int, codebook_size: int, *, codebook_dim: int | None = None, channel_first: bool = False
    ) -> None:
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        check_sizes(dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim)
        self.dim, self.codebook_dim, self.codebook_size = dim, codebook_dim, codebook_size
        self.channel_first = channel_first
        self.embed = nn.Parameter(self._new_codes(torch.randn(codebook_size, codebook_dim, dtype=torch.float32)))
        self._health = Health(codebook_size)

    def _new_codes(self, noise: Tensor) -> Tensor:
        """Return the codes of a new table, made of standard Gaussian noise of their shape."""
        return noise

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) that are put out, differentiable in embed."""
        return self.embed

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Draw a new codebook and reset the health. With several ranks all must call this, and get the same codes."""
        generator = torch.Generator("cpu").manual_seed(common_seed(2**63 - 1))
        self.embed.copy_(self._new_codes(torch.randn(self.embed.shape, generator=generator, device="cpu")))
        self.reset_health()

    @torch.no_grad()
    def _non_finite(self) -> Tensor:
        return 1 - self.embed.isfinite().all(-1).float().mean()

    def nearest_rows(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Return the indices (...) of rows (..., dim), -1 where the mask (...) is False."""
        raise NotImplementedError

    def quantize_rows(self, rows: Tensor, mask: Tensor) -> TableRows:
        """Quantize rows (..., dim), zero where the mask (...) is False."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, loss) of x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) if channel_first; any floating dtype.
            mask: bool (B, ...), True for the vectors that take part; the others get index -1 and zeros.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ...); loss (), float32, or float64 for float64 x.

        Raises:
            ValueError, TypeError: x of another shape or dtype.
        """
        layout, rows, rows_mask = self._rows(x, mask, lens)
        found = self.quantize_rows(rows, rows_mask)
        if self.training or self._measures:
            self._health.observe_(found.indices, found.error)
        return layout.from_rows(found.quantized.to(x.dtype)), layout.indices(found.indices), found.loss

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices of `forward` in eval mode, without changing any state."""
        layout, rows, rows_mask = self._rows(x, mask, lens)
        found = self.nearest_rows(rows, rows_mask)
        check_some_code("codebook", found, self.codebook)
        return layout.indices(found)

    def _rows(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> tuple[Layout, Tensor, Tensor]:
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        return layout, *exclude_non_finite(layout.to_rows(x), layout.rows_mask(mask, lens))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the output for indices (B, ...), zeros for -1: (B, ..., dim), or (B, dim, ...) if channel_first."""
        codes = self.codes_out(checked_indices(indices, self.codebook_size))
        return codes_in_layout(codes, self.channel_first)

    def codes_out(self, indices: Tensor) -> Tensor:
        """Return the output (..., dim) for indices (...), zeros for -1."""
        return lookup(self.codebook, indices)


def check_entropy(entropy_loss_weight: float, entropy_temperature: float) -> None:
    """Check the weight and the temperature of an entropy loss.

    Raises:
        ValueError: one is out of range; the message names it.
    """
    check_not_negative(entropy_loss_weight=entropy_loss_weight)
    if not entropy_temperature > 0:
        raise ValueError(f"entropy_temperature: must be positive, got {entropy_temperature}")
