"""Finite scalar quantization: each coordinate is rounded to a few levels, whose product is the codebook."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvq.codebook.health import LevelUse
from fastvq.parts.arguments import check_sizes
from fastvq.parts.binary import random_rotation
from fastvq.parts.gradients import straight_through
from fastvq.parts.indices import (
    LARGEST_INDEX,
    Radix,
    checked_indices,
    checked_levels,
    join_levels,
)
from fastvq.parts.masking import exclude_non_finite, feature_major, finite_mask, masked_mean
from fastvq.parts.projection import Projected, project_codes_out, projected_rows, projections, rotate
from fastvq.parts.scalar import Bound
from fastvq.parts.shapes import Layout, Options, codes_in_layout
from fastvq.precision import KeepsBuffers, as_scalar, may_change


def round_ste(z: Tensor) -> Tensor:
    """Return z rounded, half to even, with the gradient of z."""
    return straight_through(z, z.round())


def floor_ste(z: Tensor) -> Tensor:
    """Return z rounded down, with the gradient of z."""
    return straight_through(z, z.floor())


SEQUENCES: Options = {(first, 1): f"channel_first={first}" for first in (True, False)}
"""Images and video have their channels first in any case."""


class FSQ(Projected, LevelUse, KeepsBuffers, Radix, nn.Module):
    """Finite scalar quantizer with the API of vector_quantize_pytorch.

        quantized = project_out(code),   code_i = the nearest level of bound(project_in(z)_i)
        index = sum_i level_i prod_{j<i} L_j

    Only the projections are learned; there is no loss and no codebook that could collapse. The gradient passes straight
    through the rounding and by the derivative of the bound (`fastvq.parts.scalar.Bound`).

    Args:
        levels: L_i of each dimension, at least 2, and at least 3 unless preserve_symmetry.
        dim: dimension of the vectors; linear projections surround the code if it differs from
            len(levels) * num_codebooks.
        num_codebooks: number of codes per vector, side by side.
        keep_num_codebooks_dim: whether indices have an axis for the codebooks; by default if there are several.
        scale: stored as an attribute, without effect, as in vector_quantize_pytorch.
        allowed_dtypes: dtypes that codes are computed in; other dtypes are computed in float32.
        channel_first: vectors are (B, dim, ...); images and video always are.
        projection_has_bias: whether the projections have a bias.
        return_indices: whether `forward` returns indices, else None. Must be False beyond 2^63 codes.
        force_quantization_f32: without effect: codes are never computed in half precision.
        preserve_symmetry: levels that are symmetric about zero, with ends at -1 and 1.
        noise_dropout: in training, the probability that a coordinate of a code is moved by U(-1/2, 1/2), within [-1,
            1]. Needs preserve_symmetry.
        bound_hard_clamp: clamp instead of tanh.
        orthogonal_rotation: quantize in a random rotated basis, which is part of the state.

    Raises:
        ValueError: an invalid argument or combination of arguments, by name.

    Numerics: levels are determined by comparison with thresholds computed in float64: for z in float32 they are those
    of the formula in real numbers, the same on every device, compiled or not, and under autocast. Indices are integers
    throughout: int32 up to 2^31 codes, else int64. A rotation is applied in float64. A vector with NaN or infinity has
    index -1 and a zero output, and passes no gradient.

    Source: Mentzer et al., Finite Scalar Quantization, 2023, section 3 and appendix A.1; Parker et al., Scaling
    Transformers for Low-Bitrate High-Quality Speech Coding, 2024, section 3.2 (symmetry, noise); Chee et al., QuIP,
    2023 (rotation).
    """

    _kept_buffers = ("orthogonal_rot",)

    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        levels = checked_levels(levels, at_least=2 if preserve_symmetry else 3)
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        check_sizes(num_codebooks=num_codebooks)
        if num_codebooks > 1 and not keep:
            raise ValueError("keep_num_codebooks_dim: must be True beside num_codebooks > 1")
        if not 0 <= noise_dropout <= 1:
            raise ValueError(f"noise_dropout: must lie in [0, 1], got {noise_dropout}")
        if noise_dropout > 0 and not preserve_symmetry:
            raise ValueError("noise_dropout: needs preserve_symmetry=True")
        self.codebook_size = math.prod(levels)
        if return_indices and self.codebook_size - 1 > LARGEST_INDEX:
            raise ValueError(
                f"levels: have {self.codebook_size} codes, more than int64 can number: use return_indices=False"
            )
        if orthogonal_rotation and len(set(levels)) > 1:
            warnings.warn(f"orthogonal_rotation: mixes dimensions with unequal levels, {levels}", stacklevel=2)

        self.codebook_dim = len(levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = keep
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.scale, self.allowed_dtypes = scale, allowed_dtypes
        self.channel_first, self.return_indices = channel_first, return_indices
        self.force_quantization_f32 = force_quantization_f32
        self.preserve_symmetry, self.noise_dropout = preserve_symmetry, noise_dropout
        self.bound_hard_clamp, self.orthogonal_rotation = bound_hard_clamp, orthogonal_rotation

        self.project_in, self.project_out = projections(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
        self._set_radix(levels)
        self._bound = Bound(levels, symmetric=preserve_symmetry, hard=bound_hard_clamp)
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", random_rotation(self.codebook_dim).float())
        self._count_levels(levels)

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes (K, d), float32, computed on access; before the rotation, if there is one."""
        indices = torch.arange(self.codebook_size, device=self._levels.device)
        return self._bound.values(self._levels_of_indices(indices))

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """Return z (..., d) bounded and rounded to codes in [-1, 1], with levels that may be asymmetric."""
        bound = Bound(self._bound.levels, symmetric=False, hard=hard_clamp, eps=eps)
        return self._rounded_by(bound.to(z.device), z)

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Return z (..., d) bounded and rounded to codes symmetric about zero."""
        bound = Bound(self._bound.levels, symmetric=True, hard=hard_clamp)
        return self._rounded_by(bound.to(z.device), z)

    def quantize(self, z: Tensor) -> Tensor:
        """Return the codes (..., d) of z (..., d) in its dtype, before any rotation, noise or projection."""
        return self._rounded_by(self._bound, z)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """Return the codes with noise on a random share of the coordinates in training; see noise_dropout."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        # Drawn row by row and in float32, independent of the layout and dtype of the codes.
        rows = torch.empty_like(bounded_z, dtype=torch.float32, memory_format=torch.contiguous_format)
        if may_change(self.noise_dropout):
            chosen = _bernoulli(rows, as_scalar(self.noise_dropout))
        else:
            chosen = rows.bernoulli(self.noise_dropout).bool()
        noise = torch.rand_like(rows) - 0.5
        return torch.where(chosen, bounded_z + noise, bounded_z).clamp(-1, 1)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Return the levels (..., d) of indices (...), in their dtype; -1 for -1."""
        return self._levels_of_indices(indices).to(indices.dtype)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Return the indices (...) of codes (..., d) before projection, rotated if the layer rotates.

        Each coordinate is assigned the nearest level; exact also for codes in half precision if it separates the
        levels. -1 for codes that are not finite.
        """
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(f"zhat: must have shape (..., {self.codebook_dim}), got {tuple(zhat.shape)}")
        levels = self._bound.nearest(self._rotate(zhat))
        return join_levels(levels, self._bound.levels).masked_fill(~finite_mask(zhat), -1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the output of `forward` for indices (B, N) or (B, N, num_codebooks): (B, N, dim), zero for -1.

        Channels are second for images, video and channel_first.
        """
        indices = checked_indices(indices, self.codebook_size)
        spatial = indices.dim() - 1 - int(self.keep_num_codebooks_dim)
        codes = self.codes_of(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
            indices = indices.amax(-1)
        return codes_in_layout(
            project_codes_out(self.project_out, codes, indices >= 0), spatial >= 2 or self.channel_first
        )

    def forward(
        self, z: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | Any]:
        """Return (quantized, indices) of z.

        Args:
            z: (B, N, dim) or (B, dim); (B, dim, H, W) or (B, dim, T, H, W); (B, dim, ...) if channel_first.
            mask: bool, (B, N), (B, H, W) ...: True for the vectors that take part. The others get index -1 and zeros.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.

        Returns:
            quantized, shaped and typed as z; indices (B, N), (B, H, W) ..., with an axis for the codebooks if kept;
            None without return_indices.

        Raises:
            ValueError, TypeError: z, mask or lens of another shape or dtype.
        """
        counting = self.training or self._measures
        quantized, indices = self._forward(z, mask, lens, training=self.training, counting=counting)
        return quantized, indices if self.return_indices else None

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(self, z: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices alone, as `forward` returns them, without changing any state."""
        return self._forward(z, mask, lens, training=False, counting=False)[1]

    def _forward(
        self, z: Tensor, mask: Tensor | None, lens: Tensor | None, *, training: bool, counting: bool
    ) -> tuple[Tensor, Tensor]:
        layout = Layout.of(z, self.dim, channel_first=True if self.channel_first else None, options=SEQUENCES)
        rows, rows_mask = layout.to_rows(z), layout.rows_mask(mask, lens)
        if self.has_projections:
            rows, rows_mask = exclude_non_finite(rows, rows_mask)
        projected = projected_rows(self.project_in, rows)
        latents = feature_major(self._wide(projected))
        rows_mask = finite_mask(latents) if rows_mask is None else finite_mask(latents) & rows_mask  # [B, N]
        latents = latents.unflatten(-1, (self.num_codebooks, self.codebook_dim))  # [B, N, C, d]
        codes, indices = self.round_rows(latents, rows_mask[..., None], training=training, counting=counting)
        codes = codes.flatten(2).to(projected.dtype).contiguous()
        if self.has_projections:
            codes = project_codes_out(self.project_out, codes, rows_mask)
        indices = layout.indices(indices if self.keep_num_codebooks_dim else indices.squeeze(-1))
        return layout.from_rows(codes).to(z.dtype), indices

    def round_rows(self, latents: Tensor, mask: Tensor, *, training: bool, counting: bool) -> tuple[Tensor, Tensor]:
        """Return codes (..., d) and indices (...) of latents (..., d): `forward` between the projections.

        Latents and codes are float32 or float64; codes include rotation and noise. Where mask, which broadcasts to
        (...), is False, codes are zero and indices -1. Noise is applied in training.
        """
        codes, levels, error = self._bound(self._rotate(latents), mask, with_error=counting)
        indices = join_levels(levels, self._bound.levels).masked_fill(~mask, -1)
        if error is not None:
            self._observe(indices, levels, mask, masked_mean(error, mask))
        if training and self.noise_dropout:
            codes = torch.where(mask.unsqueeze(-1), self.maybe_apply_noise(codes), 0)
        return self._rotate_back(codes).to(latents.dtype), indices

    def codes_of(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the codes (..., d) of indices (...) before projection; zero for -1."""
        codes = self._bound.values(self._levels_of_indices(indices), dtype)
        return self._rotate_back(torch.where((indices >= 0).unsqueeze(-1), codes, 0)).to(dtype)

    def _wide(self, z: Tensor) -> Tensor:
        return z if z.dtype == torch.float64 and torch.float64 in self.allowed_dtypes else z.float()

    def _rounded_by(self, bound: Bound, z: Tensor) -> Tensor:
        return bound(self._wide(z)).codes.to(z.dtype)

    def _rotate(self, z: Tensor) -> Tensor:
        return rotate(z, self.orthogonal_rot) if self.orthogonal_rotation else z

    def _rotate_back(self, codes: Tensor) -> Tensor:
        return rotate(codes, self.orthogonal_rot.T) if self.orthogonal_rotation else codes


@torch.library.custom_op("fastvq::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _bernoulli(x: Tensor, p: Tensor) -> Tensor:
    """Return a bool tensor shaped as x, True with a probability p () that a compiled graph has as a tensor."""
    return x.bernoulli(float(p)).bool()


@_bernoulli.register_fake
def _(x: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)
