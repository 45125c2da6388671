"""Residual stack of LFQ, each stage at half the scale of the one before, and groups of such stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from fastvq.parts.arguments import check_sizes, in_the_name_of
from fastvq.parts.projection import Projected, project_codes_out, project_rows_in, projected_rows, projections
from fastvq.parts.shapes import CHANNEL_FIRST, Layout
from fastvq.precision import at_least_float32

from .grouped import Grouped
from .lfq import LFQ, rows_and_mask
from .residual import ResidualStack


class ResidualLFQ(Projected, ResidualStack):
    """Residual stack of `LFQ` with the API of vector_quantize_pytorch: D bits at each of Q stages.

        r_0 = project_in(x),   quantized = project_out(sum_q LFQ_q(r_q)),   r_{q+1} = r_q - sg[LFQ_q(r_q)]

    The codes of stage q have coordinates -2^-q and 2^-q.

    Args:
        dim: dimension of the vectors.
        num_quantizers: Q, the number of stages.
        codebook_size: K = 2^D of each stage; one pair of linear projections surrounds all stages if D differs from dim.
        quantize_dropout: in training, leave out the stages after a random one.
        quantize_dropout_cutoff_index: the first stage that may be the last active one.
        quantize_dropout_multiple_of: the number of active stages is rounded up to a multiple of this.
        soft_clamp_input_value: of the first stage, halved at each following one.
        settings: the other arguments of every stage's `LFQ`.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: residuals are float32 at least.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1 and section III-C (dropout), over `LFQ`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        for name in ("num_codebooks", "has_projections"):
            if settings.get(name, 1) not in (1, None):
                raise ValueError(f"{name}: must be left to the stages of a residual quantizer, got {settings[name]}")
        check_sizes(num_quantizers=num_quantizers)
        self.dim = dim
        self.channel_first = channel_first
        bits = max(codebook_size, 1).bit_length() - 1
        self.project_in, self.project_out = projections(dim, bits)
        self.layers = nn.ModuleList()
        for place in range(num_quantizers):
            clamp = None if soft_clamp_input_value is None else soft_clamp_input_value * 0.5**place
            own: dict[str, Any] = {"codebook_scale": 0.5**place, "soft_clamp_input_value": clamp}
            with in_the_name_of(self):
                self.layers.append(LFQ(codebook_size=codebook_size, **own, **settings))
        self._set_dropout(num_quantizers, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)

    @property
    def _channel_first(self) -> bool:
        return bool(self.channel_first)

    @property
    def codebooks(self) -> Tensor:
        """The codes of all stages (Q, K, D) by index, computed on access."""
        first = self._stages[0]
        every = torch.arange(first.codebook_size, device=first.mask.device)
        return torch.stack([stage.codes(every) for stage in self._stages])

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            mask: Tensor | None = None,
            return_all_codes: Literal[False] = False,
            rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
            *,
            lens: Tensor | None = None,
            n_quantizers: int | Tensor | None = None,
            start: int = 0,
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_all_codes: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
        *,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, ...]:
        """Return (quantized, indices, losses) of x, and all codes on request.

        Args:
            x, mask, lens: as for `LFQ`.
            return_all_codes: also return the codes of each stage.
            rand_quantize_dropout_fixed_seed: seed of the quantize dropout; by default drawn from torch's generator.
            n_quantizers, start: as for `ResidualVQ`.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ..., Q), -1 for inactive stages and excluded vectors;
            losses (Q,) float32, zero for inactive stages; codes (Q, B, ..., D).

        Raises:
            ValueError, TypeError: x or mask of another shape or dtype.
        """
        self._warn_of_hooks()
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = rows_and_mask(layout, x, mask, lens)
        residual = at_least_float32(projected_rows(self.project_in, rows))
        seed = rand_quantize_dropout_fixed_seed
        active = self._active_stages(n_quantizers, start, layout, x, self.training, seed).shaped(rows_mask.shape)
        total, absent = torch.zeros_like(residual), torch.full_like(rows_mask, -1, dtype=torch.int64)
        found, losses = [], []
        for place, stage in enumerate(self._stages):
            if active.skips(place):
                found.append(absent)
                losses.append(residual.new_zeros(()))
                continue
            stage_mask = active.fill(place, rows_mask, False)
            quantized, indices, loss, _ = stage.quantize_rows(project_rows_in(stage.project_in, residual), stage_mask)
            indices = indices.squeeze(-1)
            quantized = self._output_of(stage, quantized, indices)
            residual = residual - quantized.detach()
            total = total + quantized
            found.append(indices)
            losses.append(active.of_any_row().fill(place, loss, 0.0))
        indices = torch.stack(found, -1)
        quantized = layout.from_rows(project_codes_out(self.project_out, total, (indices >= 0).any(-1)).to(x.dtype))
        if self._stages[0].keep_num_codebooks_dim:
            indices = indices.unsqueeze(-2)
        result = (quantized, layout.indices(indices), torch.stack(losses))
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = rows_and_mask(layout, x, mask, lens)
        residual, found = at_least_float32(projected_rows(self.project_in, rows)), []
        active = self._active_stages(n_quantizers, start, layout, x).shaped(rows_mask.shape)
        for place, stage in enumerate(self._stages):
            stage_mask = active.fill(place, rows_mask, False)
            if active.skips(place):
                found.append(torch.full_like(stage_mask, -1, dtype=torch.int64))
                continue
            codes, indices = stage.nearest_rows(project_rows_in(stage.project_in, residual), stage_mask)
            found.append(indices.squeeze(-1))
            residual = residual - self._output_of(stage, codes, found[-1])
        indices = torch.stack(found, -1)
        return layout.indices(indices.unsqueeze(-2) if self._stages[0].keep_num_codebooks_dim else indices)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (Q, B, ..., D) of indices (B, ..., Q), zeros for -1.

        Indices of the first stages alone are accepted.
        """
        indices = self._checked_stages(indices)
        codes = [
            self._output_of(stage, stage.codes(chosen), chosen)
            for stage, chosen in zip(self._stages, indices.unbind(-1), strict=False)
        ]
        codes += [torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes))
        return torch.stack(codes)

    def get_output_from_indices(
        self, indices: Tensor, *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the output of `forward` for these indices, in its layout and the dtype of the codes.

        n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        if self._stages[0].keep_num_codebooks_dim:
            indices = indices.squeeze(-2)
        indices = self._checked_stages(self._chosen_stages(indices, n_quantizers, start))
        total = project_codes_out(self.project_out, self.get_codes_from_indices(indices).sum(0), (indices >= 0).any(-1))
        channel_first = total.dim() >= 4 if self.channel_first is None else self.channel_first
        return total.movedim(-1, 1) if channel_first else total


class GroupedResidualLFQ(Grouped):
    """`ResidualLFQ` by groups of channels, with the API of vector_quantize_pytorch.

    Args: see `Grouped`; settings are those of `ResidualLFQ`.

    Source: Yang et al., HiFi-Codec: Group-residual Vector Quantization, 2023.
    """

    quantizer = ResidualLFQ

    def group_settings(self, **settings: Any) -> dict[str, Any]:
        return {"channel_first": True, **settings} if self.accept_image_fmap else settings

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            mask: Tensor | None = None,
            return_all_codes: Literal[False] = False,
            *,
            lens: Tensor | None = None,
            n_quantizers: int | Tensor | None = None,
            start: int = 0,
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_all_codes: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        *,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> tuple[Any, ...]:
        """Return (quantized, indices, losses) of x, and all codes on request.

        Args:
            x: (B, N, dim), or (B, dim, ...) if accept_image_fmap.
            mask, lens, return_all_codes, n_quantizers, start: as for `ResidualLFQ`.

        Returns:
            quantized as x; indices (G, B, ..., Q); losses (G, Q); codes, a tuple of G tensors (Q, B, ..., D).
        """
        options = {"mask": mask, "lens": lens, "n_quantizers": n_quantizers, "start": start}
        return self.quantize_groups(x, return_all_codes=return_all_codes, **options)
