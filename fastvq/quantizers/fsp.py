"""Finite scalar perturbation: probabilities of coordinates, quantized to bins or perturbed within them in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvq.codebook.health import LevelUse
from fastvq.parts.arguments import check_tensors
from fastvq.parts.indices import Radix, checked_indices, checked_levels, join_levels
from fastvq.parts.losses import VectorNorm
from fastvq.parts.masking import exclude_non_finite, feature_major, finite_mask, masked_mean
from fastvq.parts.projection import Projected, project_codes_out, projected_rows, projections
from fastvq.parts.scalar import CUMULATIVE, Thresholds, with_slope
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import at_least_float32

UNIT = 1 / math.sqrt(12)
"""The standard deviation of U(0, 1)."""


def build_cdf_act(act_name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return (cumulative distribution function, its inverse) by name: tanh, sigmoid, normal, laplace or cauchy."""
    if act_name not in CUMULATIVE:
        raise ValueError(f"act_name: must be one of {', '.join(CUMULATIVE)}, got {act_name!r}")
    return CUMULATIVE[act_name].apply, CUMULATIVE[act_name].inverse


class FSP(Projected, LevelUse, Radix, nn.Module):
    """Finite scalar perturbation quantizer with the API of vector_quantize_pytorch.

    Each coordinate is mapped to its probability under a distribution, which is quantized to bins of equal probability.

        p_i = F(project_in(z)_i),   level_i = floor(L_i p_i),   q_i = (level_i + 1/2) / L_i
        quantized = project_out((q - 1/2) sqrt 12),   or project_out(F^-1(q)) with need_inv_act
        index = sum_i level_i prod_{j<i} L_j

    In training a share 1 - quantize_rate of the coordinates is perturbed instead of quantized: p_i + U(-1, 1) / (2
    L_i), if that stays within (0, 1). The gradient is that of p, or passes straight through with need_inv_act.

    Args:
        levels: L_i of each dimension.
        dim: dimension of the vectors; linear projections surround the code if it differs from len(levels).
        channel_first: vectors are (B, dim, ...).
        projection_has_bias: whether the projections have a bias.
        act_name: F: "tanh", "sigmoid", "normal", "laplace" or "cauchy".
        quantize_rate: share of coordinates that are quantized in training, in [0, 1]; in eval mode all are.
        need_inv_act: return F^-1(q), on the scale of z, instead of q with unit variance.
        vector_norm: targets for the moments of the latents: "none", "var", "kurt", "var_tanh", "var_sigmoid",
            "var_laplace".

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: levels are determined by comparison with thresholds computed in float64, so that indices are the same on
    every device; all else is computed in float32, or in float64 for z in float64. Indices are int32 up to 2^31 codes,
    else int64. A vector with NaN or infinity has index -1 and a zero output, and takes no part in the loss.

    Source: Finite Scalar Perturbation, 2026, arXiv 2602.17133.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        act_name: str = "tanh",
        quantize_rate: float = 0.0,
        need_inv_act: bool = False,
        vector_norm: str = "var_tanh",
    ) -> None:
        super().__init__()
        if not 0 <= quantize_rate <= 1:
            raise ValueError(f"quantize_rate: must lie in [0, 1], got {quantize_rate}")
        sizes = checked_levels(levels, at_least=1)
        self.codebook_dim, self.codebook_size = len(sizes), math.prod(sizes)
        self.dim = self.codebook_dim if dim is None else dim
        self.channel_first = channel_first
        self.project_in, self.project_out = projections(self.dim, self.codebook_dim, bias=projection_has_bias)
        self._set_radix(sizes)
        self.act_name = act_name
        self.act_func, self.inv_act_func = build_cdf_act(act_name)
        self.need_inv_act, self.quantize_rate = need_inv_act, quantize_rate
        self.vector_norm = VectorNorm.build(vector_norm)
        self._sizes = sizes
        edges = [torch.arange(1, size, dtype=torch.float64, device="cpu") / size for size in sizes]
        self._thresholds = Thresholds([self.inv_act_func(edge).tolist() for edge in edges])
        self._count_levels(sizes)

    def __repr__(self) -> str:
        return (
            f"FSP(levels={list(self._sizes)}, codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}, "
            f"dim={self.dim}, act_name={self.act_name!r}, need_inv_act={self.need_inv_act}, "
            f"quantize_rate={self.quantize_rate})"
        )

    def level_indices_to_indices(self, level_indices: Tensor) -> Tensor:
        """Return the indices (...) of levels (..., d), of any dtype; -1 if a level is negative."""
        return join_levels(level_indices, self._sizes).masked_fill((level_indices < 0).any(-1), -1)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Return the levels (..., d) int64 of indices (...); -1 for -1."""
        return self._levels_of_indices(indices)

    def indices_to_act_value(self, indices: Tensor) -> Tensor:
        """Return the centers of the bins, (..., d) float32 in (0, 1), of indices (...)."""
        return self._middles(self.indices_to_level_indices(indices), torch.float32)

    def indices_to_codes(self, indices: Tensor, eps: float = 1e-6) -> Tensor:
        """Return the output of `forward` in eval mode for indices (B, ...): (B, ..., dim), zero for -1.

        The result is (B, dim, ...) if channel_first. eps: distance from 0 and 1 that the argument of F^-1 is clamped
        to.
        """
        indices = checked_indices(indices, self.codebook_size)
        codes = project_codes_out(
            self.project_out, self._on_scale(self.indices_to_act_value(indices), eps), indices >= 0
        )
        return codes_in_layout(codes, self.channel_first)

    def quantize_act_value(self, act_z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (centers of the bins of probabilities (..., d), levels in their dtype).

        The gradient of the centers is that of act_z.
        """
        self.follow_(act_z.device)
        levels = (act_z.detach().clamp_max(1 - eps) * self._levels).floor()
        return with_slope(act_z, self._middles(levels, act_z.dtype), torch.ones_like(act_z)), levels

    def forward(
        self, z: Tensor, eps: float | None = None, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Return (quantized, indices, loss, details) of z.

        Args:
            z: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, ...) if channel_first. Any floating dtype.
            eps: distance from 0 and 1 that probabilities are clamped to; by default the eps of the dtype of the
                computation.
            mask, lens: as in `FSQ`.

        Returns:
            quantized, shaped and typed as z; indices (B, ...); loss (), of `VectorNorm`; details: "level_indices"
            (B, ..., d) in the dtype of the computation, -1 for excluded vectors; "norm_info", the moments; and if
            coordinates are perturbed, "p_accept_prob", the share whose perturbation stays within (0, 1).

        Raises:
            ValueError, TypeError: z, mask or lens of another shape or dtype.
        """
        layout, projected, latents, rows_mask = self._latents(z, mask, lens)
        norm_loss, norm_info = self.vector_norm(latents, rows_mask)

        levels = self._levels_of(latents, eps)
        eps = eps or torch.finfo(latents.dtype).eps
        with torch.no_grad():
            act = CUMULATIVE[self.act_name]
            p = act.apply(latents)
            value = self._middles(levels, p.dtype)
            indices = join_levels(levels, self._sizes).masked_fill(~rows_mask, -1)
            if self.training or self._measures:
                self._observe(indices, levels, rows_mask, masked_mean((p - value).square(), rows_mask))
            value, details = self._perturbed(p, value, rows_mask)
            # With the inverse the gradient passes straight through, as in vector_quantize_pytorch and the paper.
            slope = torch.ones_like(p) if self.need_inv_act else act.slope(latents, p) / UNIT
            codes = torch.where(rows_mask[:, None], self._on_scale(value, eps), 0)
        codes = with_slope(latents, codes, slope).to(projected.dtype).contiguous()
        codes = project_codes_out(self.project_out, codes, rows_mask) if self.has_projections else codes
        levels = levels.to(latents.dtype).masked_fill(~rows_mask[:, None], -1)
        levels, indices, codes = (t.unflatten(0, (layout.batch, layout.rows)) for t in (levels, indices, codes))
        details = {"level_indices": layout.indices(levels).contiguous(), "norm_info": norm_info, **details}
        return layout.from_rows(codes).to(z.dtype), layout.indices(indices), norm_loss, details

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(
        self, z: Tensor, eps: float | None = None, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> Tensor:
        """Return the indices of `forward` in eval mode, without changing any state."""
        layout, _, latents, rows_mask = self._latents(z, mask, lens)
        indices = join_levels(self._levels_of(latents, eps), self._sizes).masked_fill(~rows_mask, -1)
        return layout.indices(indices.unflatten(0, (layout.batch, layout.rows)))

    def _latents(self, z: Tensor, mask: Tensor | None, lens: Tensor | None) -> tuple[Layout, Tensor, Tensor, Tensor]:
        """Return the layout, the projected rows (B, N, d), the latents (B N, d), and the mask (B N,) of finite ones."""
        check_tensors(x=z)
        self.follow_(z.device)
        layout = Layout.of(z, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = layout.to_rows(z), layout.rows_mask(mask, lens)
        if self.has_projections:
            rows, rows_mask = exclude_non_finite(rows, rows_mask)
        projected = projected_rows(self.project_in, rows)
        latents = feature_major(at_least_float32(projected)).flatten(0, 1)
        rows_mask = finite_mask(latents) if rows_mask is None else finite_mask(latents) & rows_mask.flatten()
        return layout, projected, torch.where(rows_mask[:, None], latents, 0), rows_mask

    def _perturbed(self, p: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `value`, with some coordinates replaced by their perturbed p at random, and the share accepted."""
        if not self.training or self.quantize_rate == 1:
            return value, {}
        # Drawn row by row.
        rows = torch.empty_like(p, memory_format=torch.contiguous_format)
        proposal = p + (2 * torch.rand_like(rows) - 1) / (2 * self._levels)
        accepted = (proposal > 0) & (proposal < 1)
        perturbed = torch.where(accepted, proposal, p)
        chosen = torch.rand_like(rows) > self.quantize_rate
        return torch.where(chosen, perturbed, value), {"p_accept_prob": masked_mean(accepted.float(), mask)}

    def _levels_of(self, latents: Tensor, eps: float | None) -> Tensor:
        levels = self._thresholds(latents)
        if eps is None:
            return levels
        last = [min(size - 1, math.floor((1 - eps) * size)) for size in self._sizes]
        return torch.minimum(levels, torch.tensor(last, dtype=levels.dtype, device=levels.device))

    def _middles(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        return (levels.to(dtype) + 0.5) / self._levels

    def _on_scale(self, p: Tensor, eps: float) -> Tensor:
        return self.inv_act_func(p.clamp(eps, 1 - eps)) if self.need_inv_act else (p - 0.5) / UNIT
