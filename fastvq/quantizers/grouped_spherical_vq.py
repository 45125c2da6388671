"""Grouped spherical quantization: unit codes for groups of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Monitored
from fastvq.parts.arguments import check_sizes, check_tensors

from .llamagen_vq import LlamaGenVQ


class GroupedSphericalVQ(Monitored, nn.Module):
    """Quantizer of the directions of groups of channels (GSQ).

        x = [x_1, ..., x_G],   quantized = [LlamaGenVQ_1(x_1), ..., LlamaGenVQ_G(x_G)],   loss = mean of their losses

    Each group has a codebook of unit vectors, which begins uniformly distributed on the sphere. K^G combinations need
    no larger codebooks, and groups of few channels keep these in use.

    Args:
        dim: dimension of the vectors.
        codebook_size: K of each group.
        groups: G, which divides dim.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.
        commitment_weight, entropy_loss_weight, entropy_temperature: of each group, as for `LlamaGenVQ`.

    State: groups.0 ..., each a `LlamaGenVQ`.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: as for `LlamaGenVQ`.

    Source: Wang et al., Scaling Image Tokenizers with Grouped Spherical Quantization, 2024 (arXiv 2412.02632). The text
    of the paper was not at hand: losses are those of VQGAN for unit vectors, as in LlamaGen.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        groups: int = 2,
        *,
        channel_first: bool = False,
        commitment_weight: float = 0.25,
        entropy_loss_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, groups=groups)
        if dim % groups:
            raise ValueError(f"groups: must divide dim={dim}, got {groups}")
        self.dim, self.codebook_size, self.channel_first = dim, codebook_size, channel_first
        self.groups = nn.ModuleList(
            [
                LlamaGenVQ(
                    dim // groups,
                    codebook_size,
                    channel_first=channel_first,
                    commitment_weight=commitment_weight,
                    entropy_loss_weight=entropy_loss_weight,
                    entropy_temperature=entropy_temperature,
                )
                for _ in range(groups)
            ]
        )

    @property
    def _groups(self) -> list[LlamaGenVQ]:
        return cast("list[LlamaGenVQ]", list(self.groups))

    @property
    def _monitored(self) -> list[Monitored]:
        return list(self._groups)

    @property
    def codebooks(self) -> Tensor:
        """The unit codes (G, K, dim / G)."""
        return torch.stack([group.codebook for group in self._groups])

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, loss) of x.

        Args:
            x, mask, lens: as for `LlamaGenVQ`. A vector with a number that is not finite is left out in all groups.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ..., G); loss () float32.

        Raises:
            ValueError, TypeError: x of another shape or dtype.
        """
        quantized, indices, losses = zip(
            *(group(part, mask=mask, lens=lens) for group, part in zip(self._groups, self._split(x), strict=True)),
            strict=True,
        )
        return torch.cat(quantized, self._axis), torch.stack(indices, -1), torch.stack(losses).mean()

    if TYPE_CHECKING:
        __call__ = forward

    def encode(self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices of `forward` in eval mode, without changing any state."""
        parts = zip(self._groups, self._split(x), strict=True)
        return torch.stack([group.encode(part, mask=mask, lens=lens) for group, part in parts], -1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes of indices (B, ..., G), zeros for -1: (B, ..., dim), or (B, dim, ...) if channel_first."""
        check_tensors(indices=indices)
        if indices.shape[-1:] != (len(self.groups),):
            raise ValueError(f"indices: must have shape (..., G={len(self.groups)}), got {tuple(indices.shape)}")
        codes = [group.indices_to_codes(one) for group, one in zip(self._groups, indices.unbind(-1), strict=True)]
        return torch.cat(codes, 1 if self.channel_first and codes[0].dim() > 2 else -1)

    def reinitialize_(self) -> None:
        """Call `LlamaGenVQ.reinitialize_` of every group."""
        for group in self._groups:
            group.reinitialize_()

    @property
    def _axis(self) -> int:
        return 1 if self.channel_first else -1

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the channels of each group, not finite for all groups where they are not for one."""
        check_tensors(x=x)
        if x.dim() < 2 or x.shape[self._axis] != self.dim:
            axis = "second" if self.channel_first else "last"
            raise ValueError(f"x: must have dim={self.dim} as its {axis} size, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: must be floating point, got {x.dtype}")
        finite = x.detach().isfinite().all(self._axis, keepdim=True)
        return torch.where(finite, x, torch.nan).chunk(len(self.groups), self._axis)
