"""SimVQ: a fixed random codebook seen through a learned transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored
from fastvq.distributed import common_seed
from fastvq.functional.quantize import check_some_code, lookup, quantize
from fastvq.ops import search
from fastvq.parts.arguments import check_callables, check_sizes
from fastvq.parts.indices import checked_indices
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import KeepsBuffers, full_precision


class SimVQ(Monitored, KeepsBuffers, nn.Module):
    """Quantizer with a jointly transformed codebook, with the API of vector_quantize_pytorch.

        e = code_transform(frozen_codebook),   index = argmin_k |x - e_k|^2,   quantized = e_index
        loss = commitment_weight (mean (sg[x] - e_index)^2 + beta mean (x - sg[e_index])^2)

    Only the transform learns, from the first term, so that every step moves all codes and no code is left behind as
    dead. Loss and gradients are the same in eval mode. Vectors that are not finite get index -1 and a zero output, and
    take no part in losses and gradients.

    Args:
        dim: dimension of the vectors.
        codebook_size: K.
        codebook_transform: maps (K, frozen_codebook_dim) to (K, dim); a linear map without bias by default.
        init_fn: applied to the Gaussian codebook, of variance 1 / frozen_codebook_dim, before it is frozen.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.
        rotation_trick: estimate the gradient by the rotation trick, else straight through.
        input_to_quantize_commit_loss_weight: beta, the weight of the commitment loss of x.
        commitment_weight: weight of the whole loss.
        frozen_codebook_dim: dimension of the frozen codebook; dim by default.

    State: frozen_codebook (K, frozen_codebook_dim), float32 in modules of any dtype, and the transform's.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: search is exact (`fastvq.search`) for the transformed codes; the transform is exempt from autocast.

    Source: Zhu et al., Addressing Representation Collapse in Vector Quantized Models with One Linear Layer, 2024 (arXiv
    2411.02038), where e = C W; the losses are equation 3 of van den Oord et al. 2017; rotation: Fifty et al. 2024.
    """

    frozen_codebook: Tensor
    _kept_buffers = ("frozen_codebook",)

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        check_sizes(dim=dim, codebook_size=codebook_size, frozen_codebook_dim=frozen_dim)
        check_callables(codebook_transform=codebook_transform, init_fn=init_fn)
        if not input_to_quantize_commit_loss_weight >= 0:
            raise ValueError(
                "input_to_quantize_commit_loss_weight: must not be negative, got"
                f" {input_to_quantize_commit_loss_weight}"
            )
        self.dim, self.codebook_dim, self.codebook_size = dim, dim, codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight

        self._init_fn = init_fn
        codebook = self._new_codebook(torch.randn(codebook_size, frozen_dim))
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_dim, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", codebook)
        self._health = Health(codebook_size)

    def _new_codebook(self, noise: Tensor) -> Tensor:
        """Return a frozen codebook (K, frozen_codebook_dim) made of standard Gaussian noise."""
        codebook = noise * noise.shape[1] ** -0.5
        if self._init_fn is not None:
            codebook = self._init_fn(codebook)
            if codebook.shape != noise.shape:
                raise ValueError(f"init_fn: must keep the shape {tuple(noise.shape)}, gave {tuple(codebook.shape)}")
        return codebook

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Draw a new frozen codebook and reset the health; the transform stays.

        With several ranks all of them must call this, which gives them the same codebook.
        """
        seed = common_seed(2**63 - 1)
        noise = torch.randn(
            self.frozen_codebook.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
        )
        self.frozen_codebook.copy_(self._new_codebook(noise))
        self.reset_health()

    @property
    def codebook(self) -> Tensor:
        """The codes (K, dim), differentiable in the transform's parameters."""
        weight = next(self.code_transform.parameters(), self.frozen_codebook)
        with full_precision(self.frozen_codebook):
            return self.code_transform(self.frozen_codebook.to(weight.dtype))

    @torch.no_grad()
    def _non_finite(self) -> Tensor:
        return 1 - self.codebook.isfinite().all(-1).float().mean()

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
        quantized, indices, loss = self.quantize_rows(layout.to_rows(x), self.codebook, layout.rows_mask(mask, lens))
        return layout.from_rows(quantized), layout.indices(indices), loss

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices of `forward` in eval mode, without changing any state."""
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = layout.to_rows(x), layout.rows_mask(mask, lens)
        codebook = self.codebook
        indices = search(rows.flatten(0, 1), codebook, mask=None if rows_mask is None else rows_mask.flatten())
        check_some_code("codebook", indices, codebook)
        return layout.indices(indices.view(layout.batch, layout.rows))

    def quantize_rows(self, x: Tensor, codebook: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return `forward` of rows (..., dim), given the `codebook` and the mask (...) of rows that take part."""
        pull = self.input_to_quantize_commit_loss_weight
        quantized, indices, loss = quantize(
            x,
            codebook,
            gradient="rotation" if self.rotation_trick else "ste",
            commitment_weight=pull,
            codebook_weight=1.0,
            mask=mask,
        )
        if self.training or self._measures:
            self._health.observe_(indices, loss / (1 + pull))
        return quantized, indices, loss * self.commitment_weight

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes of indices (B, ...), zeros for -1; differentiable in the transform's parameters.

        They are (B, ..., dim), or (B, dim, ...) if channel_first.
        """
        return codes_in_layout(lookup(self.codebook, checked_indices(indices, self.codebook_size)), self.channel_first)
