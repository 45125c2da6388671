"""Latent quantization: each coordinate is replaced by the nearest of a few learned values of its dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastvq.codebook.health import LevelUse
from fastvq.codebook.storage import refuse_sharded
from fastvq.distributed import mean, recomputing, tie_parameters
from fastvq.ops import search
from fastvq.parts.arguments import check_callables, check_sizes
from fastvq.parts.gradients import straight_through
from fastvq.parts.indices import Radix, checked_indices, checked_levels, join_levels
from fastvq.parts.masking import exclude_non_finite, finite_mask, masked_mean
from fastvq.parts.projection import Projected, project_codes_out, projected_rows, projections
from fastvq.parts.shapes import Layout, codes_in_layout
from fastvq.precision import at_least_float32, constant


class LatentQuantize(Projected, LevelUse, Radix, nn.Module):
    """Latent quantizer with the API of vector_quantize_pytorch.

        quantized = project_out(v),   v_i = values_i[level_i],   level_i = argmin_k |project_in(z)_i - values_ik|
        index = sum_i level_i prod_{j<i} L_j
        loss = commitment_loss_weight mean (z' - sg[v])^2 + quantization_loss_weight mean (sg[z'] - v)^2,   z' =
        project_in(z)

    The first loss pulls the encoder to the values, the second the values to the encoder. Both are zero in eval mode.
    The gradient of quantized passes straight through to z'.

    Args:
        levels: L_i of each dimension, or one number for all codebook_dim of them.
        dim: dimension of the vectors; linear projections surround the code if it differs from the number of dimensions
            times num_codebooks.
        commitment_loss_weight, quantization_loss_weight: weights of the losses; None is 0.
        num_codebooks: number of codes per vector, side by side; they share the values.
        codebook_dim: the number of dimensions, if levels is one number.
        keep_num_codebooks_dim: whether indices have an axis for the codebooks; always if there are several.
        optimize_values: whether the values are learned.
        in_place_codebook_optimizer: makes an optimizer of the values, such as `partial(SGD, lr=0.1)`; in training each
            `forward` first steps it on the quantization loss. The returned loss then has no gradient for the values.

    Raises:
        ValueError: an invalid argument or combination of arguments, by name. RuntimeError: codebook_dim is missing.

    Numerics: the nearest value is found by `fastvq.search`: exact, and the first of equals. Values have the dtype of
    the module; everything is computed in float32, or in float64. A vector with NaN or infinity has index -1 and a zero
    output, and takes no part in the loss.

    Source: Hsu et al., Disentanglement via Latent Quantization, 2023, section 3.
    """

    # Since version 2, values that are not learned are part of the state too.
    _version = 2

    _constants = (*Radix._constants, "commitment_loss_weight", "quantization_loss_weight")

    commitment_loss_weight: Tensor
    quantization_loss_weight: Tensor

    def __init__(
        self,
        levels: Sequence[int] | int,
        dim: int,
        commitment_loss_weight: float | None = 0.1,
        quantization_loss_weight: float | None = 0.1,
        num_codebooks: int = 1,
        codebook_dim: int = -1,
        keep_num_codebooks_dim: bool | None = None,
        optimize_values: bool | None = True,
        in_place_codebook_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(levels, int):
            if codebook_dim < 1:  # vector_quantize_pytorch raises this type here
                raise RuntimeError(f"codebook_dim: must be at least 1 where levels is one number, got {codebook_dim}")
            levels = [levels] * codebook_dim
        sizes = checked_levels(levels, at_least=1)
        if codebook_dim > 0 and codebook_dim != len(sizes):
            raise ValueError(f"codebook_dim: must be the number of levels, {len(sizes)}, got {codebook_dim}")
        check_sizes(num_codebooks=num_codebooks)
        check_callables(in_place_codebook_optimizer=in_place_codebook_optimizer)
        if in_place_codebook_optimizer is not None and not optimize_values:
            raise ValueError("in_place_codebook_optimizer: needs optimize_values=True")
        self.dim = dim
        self.optimize_values = bool(optimize_values)
        self.codebook_dim, self.codebook_size = len(sizes), math.prod(sizes)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = bool(keep_num_codebooks_dim) or num_codebooks > 1
        self.project_in, self.project_out = projections(dim, self.effective_codebook_dim)
        for name, weight in (
            ("commitment_loss_weight", commitment_loss_weight),
            ("quantization_loss_weight", quantization_loss_weight),
        ):
            if not (weight or 0) >= 0:
                raise ValueError(f"{name}: must not be negative, got {weight}")
            setattr(self, name, constant(weight or 0.0, torch.float32))
        self._weights = (float(commitment_loss_weight or 0), float(quantization_loss_weight or 0))
        self._sizes = sizes
        self._set_radix(sizes)
        values = [_first_values(size) for size in sizes]
        self.values_per_latent = nn.ParameterList(nn.Parameter(v, requires_grad=self.optimize_values) for v in values)
        self.in_place_codebook_optimizer = (
            None if in_place_codebook_optimizer is None else in_place_codebook_optimizer(self.values_per_latent)
        )
        self._count_levels(sizes)

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Return the values to those of a new layer, and reset the state of their own optimizer and the health."""
        for values, size in zip(self.values_per_latent, self._sizes, strict=True):
            values.copy_(_first_values(size))
        if self.in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer.state.clear()
        self.reset_health()

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes (K, d), computed on access."""
        return self._codes(torch.arange(self.codebook_size, device=self._levels.device)).detach()

    def commitment_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """Return (z - sg[zhat])^2."""
        return F.mse_loss(z, zhat.detach(), reduction=reduce)

    def quantization_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """Return (sg[z] - zhat)^2."""
        return F.mse_loss(zhat, z.detach(), reduction=reduce)

    def quantize(self, z: Tensor) -> Tensor:
        """Return the nearest values (..., d) of coordinates (..., d), with the gradient of z."""
        wide = at_least_float32(z)
        return straight_through(wide, self._values_of(self._nearest(wide))).to(z.dtype)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Return the indices (...) of codes (..., d), by their nearest values; -1 for codes that are not finite."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(f"zhat: must have shape (..., {self.codebook_dim}), got {tuple(zhat.shape)}")
        levels = self._nearest(at_least_float32(zhat))
        return join_levels(levels, self._sizes).masked_fill((levels < 0).any(-1), -1)

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Return the output of `forward` for indices (B, ...): (B, dim, ...), zero for -1.

        Without project_out, return the values themselves.
        """
        indices = checked_indices(indices, self.codebook_size)
        codes = self._codes(indices)
        if self.keep_num_codebooks_dim:
            codes, indices = codes.flatten(-2), indices.amax(-1)
        if project_out:
            codes = project_codes_out(self.project_out, codes, indices >= 0)
        return codes_in_layout(codes, True)

    def forward(
        self, z: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, loss) of z.

        Args:
            z: (B, dim, ...) or (B, dim). Any floating dtype.
            mask, lens: as in `FSQ`.

        Returns:
            quantized, shaped and typed as z; indices (B, ...), with an axis for the codebooks if kept; loss () float32.

        Raises:
            ValueError, TypeError: z, mask or lens of another shape or dtype.
        """
        layout, projected, latents, rows_mask = self._latents(z, mask, lens)
        if self.in_place_codebook_optimizer is not None and self.training and not recomputing():
            self._step(latents, rows_mask)
        levels = self._nearest(latents)
        selected = self._values_of(levels)
        indices = join_levels(levels, self._sizes).masked_fill(~rows_mask[..., None], -1)
        if self.training or self._measures:
            error = self._error(latents.detach(), selected.detach(), rows_mask)
            self._observe(indices, levels, rows_mask[..., None], error)
        codes = straight_through(latents, torch.where(rows_mask[..., None, None], selected, 0))
        codes = codes.flatten(2).to(projected.dtype)
        quantized = layout.from_rows(project_codes_out(self.project_out, codes, rows_mask)).to(z.dtype)
        chosen = layout.indices(indices if self.keep_num_codebooks_dim else indices.squeeze(-1))
        return tie_parameters(self, (quantized, chosen, self._loss(latents, selected, rows_mask)))

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(self, z: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices of `forward` in eval mode, without changing any state."""
        layout, _, latents, rows_mask = self._latents(z, mask, lens)
        indices = join_levels(self._nearest(latents), self._sizes).masked_fill(~rows_mask[..., None], -1)
        return layout.indices(indices if self.keep_num_codebooks_dim else indices.squeeze(-1))

    def _latents(self, z: Tensor, mask: Tensor | None, lens: Tensor | None) -> tuple[Layout, Tensor, Tensor, Tensor]:
        """Return the layout, the projected rows (B, N, C d), the latents (B, N, C, d), and the mask (B, N)."""
        layout = Layout.of(z, self.dim, channel_first=True)
        rows, rows_mask = exclude_non_finite(layout.to_rows(z), layout.rows_mask(mask, lens))
        projected = projected_rows(self.project_in, rows)
        rows_mask = rows_mask & finite_mask(projected)
        latents = at_least_float32(torch.where(rows_mask[..., None], projected, 0))
        return layout, projected, latents.unflatten(-1, (self.num_codebooks, self.codebook_dim)), rows_mask

    def _loss(self, latents: Tensor, selected: Tensor, mask: Tensor) -> Tensor:
        commitment, quantization = self._weights
        loss = latents.new_zeros(())
        if not self.training:
            return loss
        if self.in_place_codebook_optimizer is not None:
            selected = selected.detach()
        if commitment:
            loss = loss + commitment * self._error(latents, selected.detach(), mask)
        if quantization:
            loss = loss + quantization * self._error(latents.detach(), selected, mask)
        return loss

    @torch.no_grad()
    def _step(self, latents: Tensor, mask: Tensor) -> None:
        """Step the values' own optimizer, equally on every rank and without touching other gradients.

        The gradient of the quantization loss is written out, because activation checkpointing would recompute a graph
        here.
        """
        optimizer = self.in_place_codebook_optimizer
        assert optimizer is not None
        refuse_sharded(self.values_per_latent, "in_place_codebook_optimizer")
        levels = self._nearest(latents).clamp_min(0)
        pull = torch.where(mask[..., None, None], self._values_of(levels) - latents, 0)
        elements = (mask.sum() * self.effective_codebook_dim).clamp_min(1)
        first = torch.arange(0, self.codebook_dim * max(self._sizes), max(self._sizes), device=levels.device)
        grads = pull.new_zeros(self.codebook_dim * max(self._sizes))
        grads.index_add_(0, (levels + first).flatten(), (2 * self._weights[1] * pull / elements).flatten())
        grads = mean(grads).view(self.codebook_dim, -1)
        for values, grad in zip(self.values_per_latent, grads, strict=True):
            values.grad = grad[: len(values)].to(values.dtype)
        optimizer.step()
        optimizer.zero_grad()

    @staticmethod
    def _error(latents: Tensor, selected: Tensor, mask: Tensor) -> Tensor:
        return masked_mean((latents - selected).square(), mask[..., None])

    def _table(self) -> Tensor:
        """Return the values of all dimensions, (d, longest), padded with NaN, which is never nearest."""
        values = [at_least_float32(v) for v in self.values_per_latent]
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=math.nan)

    def _nearest(self, z: Tensor) -> Tensor:
        """Return the levels (..., d) int64 of z (..., d); -1 where z is not finite."""
        coordinates = z.detach().reshape(-1, self.codebook_dim).T.contiguous()
        levels = search(coordinates[..., None], self._table().detach()[..., None])
        return levels.T.reshape(z.shape)

    def _values_of(self, levels: Tensor) -> Tensor:
        """Return the values (..., d) at levels (..., d), zero for -1; differentiable in the values."""
        table = self._table()
        first = torch.arange(0, table.numel(), table.shape[1], device=table.device)
        values = F.embedding(levels.clamp_min(0) + first, table.flatten()[:, None]).squeeze(-1)
        return values.masked_fill(levels < 0, 0)

    def _codes(self, indices: Tensor) -> Tensor:
        return self._values_of(self._levels_of_indices(indices))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load a state, in which values that are not learned may be absent, as in vector_quantize_pytorch 1.32.0."""
        names = [f"{prefix}values_per_latent.{i}" for i in range(self.codebook_dim)]
        version = local_metadata.get("version")
        if not self.optimize_values and (version or 1) < 2 and not any(name in state_dict for name in names):
            state_dict.update(zip(names, (v.detach() for v in self.values_per_latent), strict=True))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _first_values(size: int) -> Tensor:
    """Return values (size,) evenly spaced from -1/2, including zero."""
    return torch.linspace(-0.5, 0.5, size) if size % 2 else torch.arange(size) / size - 0.5
