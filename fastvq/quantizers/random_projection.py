"""Quantizer of random projections: untrained targets for self-supervised learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored
from fastvq.parts.arguments import check_sizes, in_the_name_of
from fastvq.parts.shapes import Layout, layout_of
from fastvq.precision import KeepsBuffers, at_least_float32, full_precision

from .vector_quantize import VectorQuantize


class RandomProjectionQuantizer(Monitored, KeepsBuffers, nn.Module):
    """Quantizer of normalized and randomly projected vectors, with the API of vector_quantize_pytorch.

        y_h = norm(x) P_h,   index_h = argmax_k cos(y_h, e_hk)     (for each of H codebooks)

    The quantizer stays in eval mode, whatever the module's mode: neither projections nor codes learn.

    Args:
        dim: dimension of the vectors.
        codebook_size: K.
        codebook_dim: number of columns of P_h.
        num_codebooks: H.
        norm: normalize each vector to zero mean and unit variance first, which prevents collapse.
        settings: other arguments of the underlying `VectorQuantize`.

    State: rand_projs (H, dim, codebook_dim), float32 in modules of any dtype; vq.

    Numerics: norm and projection are float32 at least, and exempt from autocast.

    Source: Chiu et al., Self-supervised Learning with Random-projection Quantizer for Speech Recognition, 2022, section
    3; several codebooks: Zhang et al., Google USM, 2023.
    """

    rand_projs: Tensor
    _kept_buffers = ("rand_projs",)

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, codebook_dim=codebook_dim, num_codebooks=num_codebooks)
        for name in ("heads", "use_cosine_sim", "separate_codebook_per_head"):
            if name in settings:
                raise ValueError(f"{name}: is determined by num_codebooks and must not be given")
        if settings.get("kmeans_init"):
            raise ValueError("kmeans_init: must be False, since the codebooks are random and never learn")
        self.dim, self.num_codebooks = dim, num_codebooks
        self._layout_options = {
            "channel_last": settings.pop("channel_last", True),
            "image": settings.pop("accept_image_fmap", False),
            "video": settings.pop("accept_3d_fmap", False),
        }
        if self._layout_options["image"] and self._layout_options["video"]:
            raise ValueError("accept_image_fmap, accept_3d_fmap: only one of them may be True")
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        with in_the_name_of(self):
            self.vq = VectorQuantize(
                dim=codebook_dim * num_codebooks,
                heads=num_codebooks,
                codebook_size=codebook_size,
                use_cosine_sim=True,
                separate_codebook_per_head=True,
                **settings,
            )
        self.vq.eval().requires_grad_(False)

    @property
    def _health(self) -> Health:  # type: ignore[override]
        return self.vq._health

    def train(self, mode: bool = True) -> RandomProjectionQuantizer:
        super().train(mode)
        self.vq.eval()
        return self

    def reinitialize_(self) -> None:
        """Draw new random codes, as `VectorQuantize.reinitialize_` does; the projections stay."""
        self.vq.reinitialize_()

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
    ) -> Tensor:
        """Return the indices of x; given indices, return the cross-entropy of the similarities to the codes.

        Args:
            x: (B, N, dim), or (B, dim, N), (B, dim, H, W) or (B, dim, T, H, W) with the options of `VectorQuantize`
                that say so; any floating dtype.
            indices: int64 (B, N), or (B, N, H) for several codebooks; (B, H, W) ... for images and video.
            mask: bool (B, N), True for the vectors that take part; the others get -1. lens: int (B,), a mask: the first
                lens[b] vectors take part.

        Returns:
            int64 (B, N) or (B, N, H), -1 for vectors that are excluded or not finite; or the loss ().

        Raises:
            ValueError, TypeError: x or indices of another shape or dtype.
        """
        layout, projected, rows_mask = self._project(x, mask, lens)
        if indices is not None:
            return self.vq(projected, indices=layout.indices_to_rows(indices), mask=rows_mask)[1]
        found = self.vq(projected, mask=rows_mask)[1]
        if self.training or self._measures:
            self._health.observe_(found.movedim(-1, 0) if self.num_codebooks > 1 else found)
        return layout.indices(found)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices, as `forward` does, without counting them."""
        layout, projected, rows_mask = self._project(x, mask, lens)
        return layout.indices(self.vq.encode(projected, rows_mask))

    def _project(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> tuple[Layout, Tensor, Tensor | None]:
        """Return the layout, the projections (B, N, H D) of all codebooks, and the mask (B, N)."""
        layout = layout_of(x, self.dim, **self._layout_options, single=False)
        rows_mask = layout.rows_mask(mask, lens)
        rows = layout.to_rows(x)
        with full_precision(rows):
            normed = self.norm(at_least_float32(rows))
            projected = torch.einsum("bnd,hde->bnhe", normed, self.rand_projs.to(normed.dtype)).flatten(2)
        return layout, projected.to(next(self.vq.project_in.parameters(), projected).dtype), rows_mask
