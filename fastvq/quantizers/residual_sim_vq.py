"""A stack of SimVQ, each for what the ones before it left over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq.functional.quantize import lookup
from fastvq.parts.shapes import Layout, codes_in_layout

from .residual import ResidualStack
from .sim_vq import SimVQ


class ResidualSimVQ(ResidualStack):
    """Codes each vector by one code of each of Q levels of `SimVQ`, with the API of vector_quantize_pytorch.

        r_0 = x,   quantized = sum_q SimVQ_q(r_q),   r_{q+1} = r_q - sg[SimVQ_q(r_q)]

    Args:
        dim: dimension of the vectors.
        num_quantizers: Q.
        codebook_size: K of each level.
        heads: 1.
        quantize_dropout: in training, leave out the levels after a random one.
        quantize_dropout_cutoff_index: the first level that may be the last.
        quantize_dropout_multiple_of: the number of levels that are kept is rounded up to a multiple of it.
        channel_first, rotation_trick: as for `SimVQ`.
        sim_vq_kwargs: the other arguments of every level's `SimVQ`.

    Raises:
        ValueError: an argument that can't be, by name.

    Numerics: residuals are float32 for x in half precision; the search of each level is exact for them.

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
        self.layers = nn.ModuleList([SimVQ(dim, codebook_size, **settings) for _ in range(num_quantizers)])

    @property
    def codebook_size(self) -> int:
        """K."""
        return self._stages[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        """Dimension of the codes, which is that of the vectors."""
        return self._stages[0].codebook_dim

    @property
    def codebooks(self) -> Tensor:
        """The codes of all levels (Q, K, dim), differentiable in the transforms' parameters."""
        return torch.stack([layer.codebook for layer in self._stages])

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(quantized, indices, losses) of x, and all codes if asked for.

        Args:
            x: (B, ..., dim), or (B, dim, ...) if channel_first; any floating dtype.
            return_all_codes: also return the codes of each level.
            rand_quantize_dropout_fixed_seed: decides where dropout cuts; by default torch's generator does.
            mask, lens: as for `SimVQ`.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ..., Q), -1 for levels dropped and vectors that
            don't count; losses (Q,) float32, zero for levels dropped; codes (Q, B, ..., dim), or (Q, B, dim, ...).

        Raises:
            ValueError, TypeError: x doesn't fit.
        """
        layout = Layout.of(x, self.codebook_dim, channel_first=self.channel_first)
        active = self._dropout.draw(self.training, x, rand_quantize_dropout_fixed_seed)
        residual = layout.to_rows(x)
        residual = residual.float() if x.dtype in (torch.float16, torch.bfloat16) else residual
        total = torch.zeros_like(residual)
        rows_mask = layout.rows_mask(mask, lens)
        levels, losses, codebooks = [], [], []
        for level, layer in enumerate(self._stages):
            if active.skips(level):
                break
            codebooks.append(layer.codebook)
            quantized, indices, loss = layer.quantize_rows(
                residual, codebooks[-1], active.row_mask(level, rows_mask, residual)
            )
            residual = residual - quantized.detach()
            total = total + quantized
            levels.append(indices)
            losses.append(loss)
        dropped = self.num_quantizers - len(levels)
        indices = layout.indices(nn.functional.pad(torch.stack(levels, -1), (0, dropped), value=-1))
        result = (
            layout.from_rows(total.to(x.dtype)),
            indices,
            nn.functional.pad(torch.stack(losses), (0, dropped)),
        )
        return (*result, self._codes(codebooks, indices)) if return_all_codes else result

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes (Q, B, ..., dim), or (Q, B, dim, ...) if channel_first, of indices (B, ..., Q); zeros for -1.
        Indices of the first levels alone will do."""
        indices = self._checked_stages(indices)
        given = indices.shape[-1]
        return self._codes([layer.codebook for layer in self._stages[:given]], indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives as quantized for these indices, in the dtype of the codes."""
        return self.get_codes_from_indices(indices).sum(0)

    def _codes(self, codebooks: list[Tensor], indices: Tensor) -> Tensor:
        """The codes of all levels, zeros for those that `codebooks` leaves out."""
        codes = [lookup(codebook, level) for codebook, level in zip(codebooks, indices.unbind(-1), strict=False)]
        codes += [torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes))
        return torch.stack([codes_in_layout(level, self.channel_first) for level in codes])
