"""Residual stack of SimVQ, each stage for the residual of those before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from fastvq.distributed import tie_parameters
from fastvq.functional.quantize import check_some_code, lookup
from fastvq.ops import search
from fastvq.parts.arguments import in_the_name_of
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import at_least_float32

from .residual import ResidualStack
from .sim_vq import SimVQ


class ResidualSimVQ(ResidualStack):
    """Residual stack of `SimVQ` with the API of vector_quantize_pytorch: one code of each of Q stages.

        r_0 = x,   quantized = sum_q SimVQ_q(r_q),   r_{q+1} = r_q - sg[SimVQ_q(r_q)]

    Args:
        dim: dimension of the vectors.
        num_quantizers: Q, the number of stages.
        codebook_size: K of each stage.
        heads: must be 1.
        quantize_dropout: in training, leave out the stages after a random one.
        quantize_dropout_cutoff_index: the first stage that may be the last active one.
        quantize_dropout_multiple_of: the number of active stages is rounded up to a multiple of this.
        channel_first, rotation_trick: as for `SimVQ`.
        sim_vq_kwargs: the other arguments of every stage's `SimVQ`.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: residuals are float32 for x in half precision; the search of each stage is exact for them.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1 and section III-C (dropout), over `SimVQ`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads: must be 1 for a residual quantizer, got {heads}")
        self.channel_first = channel_first
        self._set_dropout(num_quantizers, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        settings = {"channel_first": channel_first, "rotation_trick": rotation_trick} | sim_vq_kwargs
        with in_the_name_of(self):
            self.layers = nn.ModuleList([SimVQ(dim, codebook_size, **settings) for _ in range(num_quantizers)])

    @property
    def codebook_size(self) -> int:
        """K, the number of codes of each stage."""
        return self._stages[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        """Dimension of the codes, which is that of the vectors."""
        return self._stages[0].codebook_dim

    @property
    def codebooks(self) -> Tensor:
        """The codes of all stages (Q, K, dim), differentiable in the transforms' parameters."""
        return torch.stack([stage.codebook for stage in self._stages])

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            return_all_codes: Literal[False] = False,
            rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
            *,
            mask: Tensor | None = None,
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
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, ...]:
        """Return (quantized, indices, losses) of x, and all codes on request.

        Args:
            x: (B, ..., dim), or (B, dim, ...) if channel_first; any floating dtype.
            return_all_codes: also return the codes of each stage.
            rand_quantize_dropout_fixed_seed: seed of the quantize dropout; by default drawn from torch's generator.
            mask, lens: as for `SimVQ`.
            n_quantizers, start: as for `ResidualVQ`.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ..., Q), -1 for inactive stages and excluded vectors;
            losses (Q,) float32, zero for inactive stages; codes (Q, B, ..., dim), or (Q, B, dim, ...).

        Raises:
            ValueError, TypeError: x of another shape or dtype.
        """
        layout = Layout.of(x, self.codebook_dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        self._warn_of_hooks()
        seed = rand_quantize_dropout_fixed_seed
        active = self._active_stages(n_quantizers, start, layout, x, self.training, seed)
        active = active.shaped((layout.batch, layout.rows))
        residual = at_least_float32(layout.to_rows(x))
        total = torch.zeros_like(residual)
        rows_mask = layout.rows_mask(mask, lens)
        found, codebooks = [], []
        stage_losses: list[Tensor] = []
        for place, stage in enumerate(self._stages):
            if active.skips(place):
                continue
            codebooks.append(stage.codebook)
            quantized, indices, loss = stage.quantize_rows(
                residual, codebooks[-1], active.row_mask(place, rows_mask, residual)
            )
            residual = residual - quantized.detach()
            total = total + quantized
            found.append(indices)
            stage_losses.append(loss)
        around = (start, self.num_quantizers - start - len(found))
        indices = layout.indices(nn.functional.pad(torch.stack(found, -1), around, value=-1))
        losses = nn.functional.pad(torch.stack(stage_losses), around)
        result = tie_parameters(self, (layout.from_rows(total.to(x.dtype)), indices, losses))
        if not return_all_codes:
            return result
        return (*result, self._codes([stage.codebook for stage in self._stages[:start]] + codebooks, indices))

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
        layout = Layout.of(x, self.codebook_dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows_mask = layout.rows_mask(mask, lens)
        active = self._active_stages(n_quantizers, start, layout, x)
        flat_mask = None if rows_mask is None else rows_mask.flatten()
        residual, found = at_least_float32(layout.to_rows(x)).flatten(0, 1), []
        for place, stage in enumerate(self._stages):
            if active.skips(place):
                found.append(torch.full(residual.shape[:1], -1, device=x.device))
                continue
            codebook = stage.codebook
            found.append(search(residual, codebook, mask=active.row_mask(place, flat_mask, residual)))
            check_some_code("codebook", found[-1], codebook)
            residual = residual - lookup(codebook, found[-1])
        return layout.indices(torch.stack(found, -1).view(layout.batch, layout.rows, self.num_quantizers))

    def reinitialize_(self) -> None:
        """Call `SimVQ.reinitialize_` of every stage."""
        for stage in self._stages:
            stage.reinitialize_()

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (Q, B, ..., dim) of indices (B, ..., Q), zeros for -1.

        They are (Q, B, dim, ...) if channel_first. Indices of the first stages alone are accepted.
        """
        indices = self._checked_stages(indices)
        given = indices.shape[-1]
        return self._codes([stage.codebook for stage in self._stages[:given]], indices)

    def get_output_from_indices(
        self, indices: Tensor, *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the output of `forward` for these indices, in the dtype of the codes.

        n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        return self.get_codes_from_indices(self._chosen_stages(indices, n_quantizers, start)).sum(0)

    def _codes(self, codebooks: list[Tensor], indices: Tensor) -> Tensor:
        """Return the codes of all stages, zeros for stages without an entry in `codebooks`."""
        codes = [lookup(codebook, chosen) for codebook, chosen in zip(codebooks, indices.unbind(-1), strict=False)]
        codes += [torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes))
        return torch.stack([codes_in_layout(place, self.channel_first) for place in codes])
