"""Residual finite scalar quantization: a stack of increasingly fine grids, each for the residual of those before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from fastvq.parts.arguments import check_tensors, in_the_name_of
from fastvq.parts.binary import soft_clamp
from fastvq.parts.dropout import ActiveStages
from fastvq.parts.indices import checked_indices, checked_levels, index_dtype
from fastvq.parts.masking import exclude_non_finite, feature_major, finite_mask
from fastvq.parts.projection import Projected, project_codes_out, project_rows_in, projected_rows, projections
from fastvq.parts.shapes import Layout, channel_first_options, codes_in_layout
from fastvq.precision import Unsaved, constant, widest_dtype

from .fsq import FSQ
from .grouped import Grouped
from .residual import ResidualStack

IS_CHANNEL_FIRST = channel_first_options("is_channel_first")


class ResidualFSQ(Unsaved, Projected, ResidualStack):
    """Residual stack of `FSQ` with the API of vector_quantize_pytorch.

        r_0 = c tanh(project_in(x) / c),   code_q = s_q FSQ(r_q / s_q),   r_{q+1} = r_q - sg[code_q]
        quantized = project_out(sum_q code_q),   s_q = L^-q in each dimension,   c = 1 + 1 / (L - 1)

    The gradient reaches x through each stage.

    Args:
        levels: L of each dimension, at least 2, the same at all stages.
        num_quantizers: Q, the number of stages.
        dim: dimension of the vectors; linear projections surround the codes if it differs from len(levels).
        is_channel_first: x is (B, dim, ...), and indices are (B, Q, ...).
        quantize_dropout: in training, leave out the stages after a random one.
        quantize_dropout_cutoff_index: the first stage that may be the last active one.
        quantize_dropout_multiple_of: the number of active stages is rounded up to a multiple of this.
        soft_clamp_input_value: c, a number or one for each dimension; None for no soft clamp. Follows from the levels
            if bound_hard_clamp is set.
        bound_hard_clamp: bound by clamping, after the soft clamp of the input, instead of by tanh at each stage.
        settings: arguments of each stage's `FSQ`: noise_dropout, orthogonal_rotation ...

    Raises:
        ValueError: an invalid argument or combination of arguments, by name.

    Numerics: the soft clamp and the residuals are float64 (float32 on devices without it) and are compared with exact
    thresholds, so that fine levels are not rounding noise (docs/exactness.md). Vectors that are not finite get index -1
    and a zero output.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1; Mentzer et al., Finite Scalar Quantization, 2023.
    """

    _constants = ("scales", "soft_clamp_input_value")

    scales: Tensor
    soft_clamp_input_value: Tensor | None

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        sizes = checked_levels(levels, at_least=2)
        if bound_hard_clamp and soft_clamp_input_value is not None:
            raise ValueError("soft_clamp_input_value: follows from the levels beside bound_hard_clamp=True")
        for name in {"num_codebooks", "keep_num_codebooks_dim", "channel_first", "return_indices"} & set(settings):
            raise ValueError(f"{name}: cannot be set for the stages of a ResidualFSQ")
        if bound_hard_clamp:
            soft_clamp_input_value = [1 + 1 / (size - 1) for size in sizes]

        self.levels = levels
        self.dim = len(sizes) if dim is None else dim
        self.is_channel_first = is_channel_first
        self._set_dropout(num_quantizers, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)

        self.project_in, self.project_out = projections(self.dim, len(sizes))
        with in_the_name_of(self):
            self.layers = nn.ModuleList(
                FSQ(sizes, dim=len(sizes), preserve_symmetry=True, bound_hard_clamp=bound_hard_clamp, **settings)
                for _ in range(num_quantizers)
            )
        self.codebook_size = self._stages[0].codebook_size
        scales = [[size**-place for size in sizes] for place in range(num_quantizers)]
        self.scales = constant(scales, torch.float32)
        if soft_clamp_input_value is None or isinstance(soft_clamp_input_value, Tensor):
            self.soft_clamp_input_value = None if soft_clamp_input_value is None else soft_clamp_input_value.float()
        else:
            self.soft_clamp_input_value = constant(soft_clamp_input_value, torch.float32)

    @property
    def _channel_first(self) -> bool:
        return self.is_channel_first

    @property
    def codebooks(self) -> Tensor:
        """All codes of all stages before scaling, (Q, K, d), computed on access."""
        return torch.stack([stage.implicit_codebook for stage in self._stages])

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            return_all_codes: Literal[False] = False,
            rand_quantize_dropout_fixed_seed: int | None = None,
            *,
            mask: Tensor | None = None,
            lens: Tensor | None = None,
            n_quantizers: int | Tensor | None = None,
            start: int = 0,
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_all_codes: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, ...]:
        """Return (quantized, indices) of x, and all codes on request.

        Args:
            x: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, ...) if is_channel_first. Any floating dtype.
            return_all_codes: also return the codes of each stage.
            rand_quantize_dropout_fixed_seed: seed of the quantize dropout; by default drawn from torch's generator.
            mask, lens: as in `FSQ`.
            n_quantizers, start: as for `ResidualVQ`. The soft clamp bounds what enters the first stage alone.

        Returns:
            quantized, shaped and typed as x; indices (B, N, Q), (B, Q) or (B, Q, ...), -1 for inactive stages and
            excluded vectors; codes (Q, B, N, d) or (Q, B, ..., d).

        Raises:
            ValueError, TypeError: x, mask or lens of another shape or dtype.
        """
        self._warn_of_hooks()
        layout = self._layout(x)
        active = self._active_stages(n_quantizers, start, layout, x, self.training, rand_quantize_dropout_fixed_seed)
        counting = self.training or self._measures
        result = self._forward(x, layout, layout.rows_mask(mask, lens), active, self.training, counting)
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        layout = self._layout(x)
        active = self._active_stages(n_quantizers, start, layout, x)
        return self._forward(x, layout, layout.rows_mask(mask, lens), active, training=False, counting=False)[1]

    def _layout(self, x: Tensor) -> Layout:
        return Layout.of(x, self.dim, channel_first=self.is_channel_first, options=IS_CHANNEL_FIRST)

    def _forward(
        self,
        x: Tensor,
        layout: Layout,
        rows_mask: Tensor | None,
        active: ActiveStages,
        training: bool,
        counting: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = layout.to_rows(x)
        if self.has_projections:
            rows, rows_mask = exclude_non_finite(rows, rows_mask)
        projected = projected_rows(self.project_in, rows)
        latents = feature_major(projected.to(widest_dtype(x.device)))
        rows_mask = finite_mask(latents) if rows_mask is None else finite_mask(latents) & rows_mask
        latents = torch.where(rows_mask[..., None], latents, 0)
        latents = latents if active.start else self._soft_clamp(latents)
        active = active.shaped(rows_mask.shape)
        total, indices = self._run_stages(latents, rows_mask, active, training, counting)
        total = project_codes_out(self.project_out, total.to(projected.dtype).contiguous(), rows_mask)
        indices = codes_in_layout(layout.indices(indices), self.is_channel_first)
        return layout.from_rows(total).to(x.dtype), indices

    def _run_stages(
        self, residual: Tensor, mask: Tensor, active: ActiveStages, training: bool, counting: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the codes (B, N, d) and the indices (B, N, Q)."""
        self.follow_(residual.device)
        total = torch.zeros_like(residual)
        indices: list[Tensor] = []
        for place, (stage, scale) in enumerate(zip(self._stages, self.scales.to(residual.dtype), strict=True)):
            if active.skips(place):
                indices.append(torch.full_like(mask, -1, dtype=index_dtype(self._stages[0]._bound.levels)))
                continue
            stage_mask = active.fill(place, mask, False)
            scaled = project_rows_in(stage.project_in, residual / scale)
            codes, chosen = stage.round_rows(scaled, stage_mask, training=training, counting=counting)
            codes = self._output_of(stage, codes, chosen) * scale
            residual = residual - codes.detach()
            total = total + codes
            indices.append(chosen)
        return total, torch.stack(indices, -1)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (Q, B, ..., d) float32 of indices (B, ..., Q), zeros for -1.

        Indices are (B, Q, ...) if is_channel_first. Indices of the first stages alone are accepted.
        """
        return torch.stack([codes.float() for codes in self._codes(indices)])

    def get_output_from_indices(
        self, indices: Tensor, *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the output of `forward` for these indices, in float32 or the projection's dtype.

        n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        check_tensors(indices=indices)
        chosen = self._chosen_stages(self._channels_last(indices), n_quantizers, start)
        indices = codes_in_layout(chosen, self.is_channel_first)
        total: Tensor = sum(self._codes(indices))  # type: ignore[assignment]
        mask = (checked_indices(chosen, self.codebook_size) >= 0).any(-1)
        output = project_codes_out(self.project_out, total if self.has_projections else total.float(), mask)
        return codes_in_layout(output, self.is_channel_first)

    def _codes(self, indices: Tensor) -> list[Tensor]:
        check_tensors(indices=indices)
        self.follow_(indices.device)
        indices = self._channels_last(indices)
        if not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"indices: must have 1 to {self.num_quantizers} stages in their "
                f"{'second' if self.is_channel_first else 'last'} axis, got {indices.shape[-1]}"
            )
        dtype = widest_dtype(indices.device)
        given = list(checked_indices(indices, self._stages[0].codebook_size).unbind(-1))
        given += [torch.full_like(given[0], -1)] * (self.num_quantizers - len(given))
        return [
            self._output_of(stage, stage.codes_of(chosen, dtype), chosen) * scale
            for stage, scale, chosen in zip(self._stages, self.scales.to(dtype), given, strict=True)
        ]

    def _channels_last(self, indices: Tensor) -> Tensor:
        return indices.movedim(1, -1) if self.is_channel_first and indices.dim() > 2 else indices

    def _soft_clamp(self, latents: Tensor) -> Tensor:
        if self.soft_clamp_input_value is None:
            return latents
        self.follow_(latents.device)
        return soft_clamp(latents, self.soft_clamp_input_value.to(latents.dtype))


class GroupedResidualFSQ(Grouped):
    """`ResidualFSQ` by groups of channels, with the API of vector_quantize_pytorch.

    Args: see `Grouped`; settings are those of `ResidualFSQ`. accept_image_fmap and is_channel_first are equivalent
        here: x is (B, dim, ...), and indices are (G, B, Q, ...).

    Source: Yang et al., HiFi-Codec: Group-residual Vector Quantization, 2023.
    """

    quantizer = ResidualFSQ

    def group_settings(self, **settings: Any) -> dict[str, Any]:
        self.accept_image_fmap = self.accept_image_fmap or settings.pop("is_channel_first", False)
        return {**settings, "is_channel_first": self.accept_image_fmap}

    @property
    def codebook_size(self) -> int:
        """Number of codes of each stage."""
        return self._groups[0].codebook_size

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            return_all_codes: Literal[False] = False,
            *,
            mask: Tensor | None = None,
            lens: Tensor | None = None,
            n_quantizers: int | Tensor | None = None,
            start: int = 0,
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_all_codes: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> tuple[Any, ...]:
        """Return (quantized, indices) of x, and all codes on request.

        Args:
            x: (B, N, dim) or (B, ..., dim); (B, dim, ...) if accept_image_fmap.
            return_all_codes, mask, lens, n_quantizers, start: as for `ResidualFSQ`.

        Returns:
            quantized as x; indices (G, B, ..., Q), or (G, B, Q, ...); codes, a tuple of G tensors (Q, B, ..., d).
        """
        options = {"mask": mask, "lens": lens, "n_quantizers": n_quantizers, "start": start}
        return self.quantize_groups(x, return_all_codes=return_all_codes, **options)
