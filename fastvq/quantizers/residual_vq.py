"""Residual quantization: a stack of codebooks, each for what the ones before it left over."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..codebook import learn_together
from ..functional import lookup, residual_quantize
from ..health import Monitored
from ..ops import residual_search
from ..parts.dropout import QuantizeDropout, kept_levels
from ..parts.layout import Layout, codes_layout
from .vector_quantize import VectorQuantize


class ResidualVQ(Monitored, nn.Module):
    """Codes each vector by one code of each level, with the API of vector_quantize_pytorch.

        r_0 = project_in(x),   index_q = argmin_k |r_q - e_qk|^2,   r_{q+1} = r_q - sg[e_q,index_q]
        quantized = project_out(sum_q e_q,index_q)
        loss_q = commitment_weight mean (r_q - sg[e_q,index_q])^2     (zero in eval)

    Every level learns as a `VectorQuantize` does, from its own residuals; the gradient reaches x through each level.

    Args:
        dim: dimension of the vectors that come in and go out.
        num_quantizers: Q; may be left out where codebook_size is a tuple.
        codebook_size: K, or a tuple of one for each level.
        codebook_dim: D, the dimension of the codes; one pair of linear projections stands around all levels where it
            isn't dim.
        shared_codebook: all levels use one codebook, which learns from the residuals of all.
        quantize_dropout: in training, leave out the levels after a random one.
        quantize_dropout_cutoff_index: the first level that may be the last.
        quantize_dropout_multiple_of: the number of levels that are kept is rounded up to a multiple of it.
        accept_image_fmap: x is (B, dim, H, W).
        settings: of every level's `VectorQuantize`: decay, kmeans_init, threshold_ema_dead_code ...

    Raises:
        ValueError: an argument that can't be, by name. TypeError: one that doesn't exist, or doesn't yet.

    Numerics: search is exact for residuals rounded to float32, whatever the dtype of x (`fastvq.residual_search`).

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1 and section III-C (dropout).
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("num_quantizers: must be given where codebook_size is one number")
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        if not sizes or (num_quantizers is not None and num_quantizers != len(sizes)):
            raise ValueError(f"num_quantizers: must be the number of levels, at least 1, got {num_quantizers}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size: must be one number where the codebook is shared, got {codebook_size}")
        QuantizeDropout(
            len(sizes), quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        ).check()
        codebook_dim = dim if codebook_dim is None else codebook_dim

        self.dim, self.codebook_dim = dim, codebook_dim
        self.num_quantizers, self.codebook_sizes = len(sizes), sizes
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.accept_image_fmap = accept_image_fmap

        projects = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projects else nn.Identity()
        self.layers = nn.ModuleList([VectorQuantize(dim=codebook_dim, codebook_size=k, **settings) for k in sizes])
        if shared_codebook:
            for layer in self._levels:
                layer._codebook = self._levels[0]._codebook

    @property
    def _levels(self) -> list[VectorQuantize]:
        return [cast(VectorQuantize, layer) for layer in self.layers]

    @property
    def _monitored(self) -> list[Monitored]:
        return list(self._levels)

    @property
    def codebook_size(self) -> int:
        """K of the first level."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes of all levels, (Q, K, D), or a tuple of (K_q, D) where the sizes differ."""
        codes = tuple(layer.codebook for layer in self._levels)
        return torch.stack(codes) if len(set(self.codebook_sizes)) == 1 else codes

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_all_codes: bool = False,
        freeze_codebook: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """(quantized, indices, losses) of x, and all codes if asked for.

        Args:
            x: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, H, W) if accept_image_fmap. Any floating dtype.
            mask: bool, shaped as the vectors, as in `VectorQuantize`.
            return_all_codes: also return the codes of each level.
            freeze_codebook: leave the codebooks as they are.
            rand_quantize_dropout_fixed_seed: decides where dropout cuts; by default torch's generator does.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, N, Q), (B, Q) or (B, H, W, Q), -1 for levels dropped and
            vectors that don't count; losses (Q,) float32, zero for levels dropped; codes (Q, B, N, D).

        Raises:
            ValueError, TypeError: x or mask that don't fit.
        """
        layout = self._layout(x)
        rows_mask = layout.rows_mask(mask)
        projected = self.project_in(layout.to_rows(x))
        projects = isinstance(self.project_out, nn.Linear)
        if projects and projected.dtype in (torch.float16, torch.bfloat16):
            projected = projected.float()  # what is projected back isn't rounded in between
        kept = self._kept_levels(rand_quantize_dropout_fixed_seed)
        learning = self.training and not (freeze_codebook or self._levels[0].freeze_codebook)
        at_once = self._searches_at_once(learning) and not (self._levels[0].learnable_codebook and learning)
        through_levels = self._all_levels if at_once else self._level_by_level
        total, indices, losses = through_levels(projected, rows_mask, learning, kept)
        dropped = self.num_quantizers - kept
        indices = nn.functional.pad(indices, (0, dropped), value=-1)
        losses = nn.functional.pad(losses, (0, dropped))
        quantized = layout.from_rows(self._project_out(total, indices).to(x.dtype))
        indices = layout.indices(indices)
        result = (quantized, indices, losses)
        return (*result, self.get_codes_from_indices(indices)) if return_all_codes else result

    def _all_levels(self, x: Tensor, mask: Tensor | None, learning: bool, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized (..., D), indices (..., kept) and losses (kept,) of all levels in one pass; then each learns."""
        first = self._levels[0]
        quantized, indices, losses, residuals = residual_quantize(
            x if self.training else x.detach(),
            torch.stack([layer.codebook.detach() for layer in self._levels[:kept]]),
            gradient="rotation" if first.rotation_trick else "ste",
            commitment_weight=1.0,
            mask=mask,
            keep_residuals=learning,
            copy_codebooks=False,
        )
        if self.training:
            self._observe(indices, losses.detach())
        if learning:
            self._learn(residuals, indices)
        weight = first.commitment_weight if self.training else 0.0
        return quantized, indices, losses * weight if weight else torch.zeros_like(losses)

    def _level_by_level(
        self, x: Tensor, mask: Tensor | None, learning: bool, kept: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, where each level must search by itself or its codebook takes a gradient."""
        residual = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        total = torch.zeros_like(residual)
        levels, losses, residuals = [], [], []
        for layer in self._levels[:kept]:
            inputs = layer._project_in(residual)
            residuals.append(layer._project_in(residual.detach()))
            quantized, indices, loss = layer.quantize_rows(inputs, mask, learning=learning and not self.shared_codebook)
            residual = residual - quantized.detach()
            total = total + quantized
            levels.append(indices)
            losses.append(loss)
        indices = torch.stack(levels, -1)
        if learning and self.shared_codebook:
            self._learn(torch.stack(residuals), indices)
        return total, indices, torch.stack(losses)

    def _observe(self, indices: Tensor, errors: Tensor) -> None:
        for layer, chosen, error in zip(self._levels, indices.unbind(-1), errors, strict=False):
            layer._health.observe_(chosen.flatten(), error)

    def _learn(self, residuals: Tensor, indices: Tensor) -> None:
        """Moves the codebooks to the residuals (levels, ..., D), with their indices (..., levels)."""
        codebooks = [layer._codebook for layer in self._levels[: len(residuals)]]
        learn_together(codebooks, residuals.flatten(1, -2)[:, None], indices.flatten(0, -2).T[:, None])

    def encode(self, x: Tensor) -> Tensor:
        """The indices alone, of all levels, shaped as `forward` returns them. Touches no state."""
        layout = self._layout(x)
        rows = self.project_in(layout.to_rows(x)).detach()
        if self._searches_at_once(False):
            codebooks = torch.stack([layer.codebook.detach() for layer in self._levels])
            found = residual_search(rows.flatten(0, -2), codebooks).reshape(*rows.shape[:-1], -1)
        else:
            levels, residual = [], rows.float() if rows.dtype != torch.float64 else rows
            for layer in self._levels:
                levels.append(layer.encode(residual))
                residual = residual - lookup(layer.codebook, levels[-1])
            found = torch.stack(levels, -1)
        return layout.indices(found)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes (Q, ..., D) of indices (..., Q), zeros for -1. Indices of the first levels alone will do."""
        if not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"indices: must have shape (..., 1 to {self.num_quantizers} levels), got {tuple(indices.shape)}"
            )
        given = indices.unbind(-1)
        absent = torch.full_like(given[0], -1)
        given += (absent,) * (self.num_quantizers - len(given))
        return torch.stack([lookup(layer.codebook, i) for layer, i in zip(self._levels, given, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives as quantized for these indices, vectors last unless accept_image_fmap."""
        total = self._project_out(self.get_codes_from_indices(indices).sum(0), indices)
        return codes_layout(total, self.accept_image_fmap)

    def _searches_at_once(self, learning: bool) -> bool:
        """Whether one pass can search all levels. Each must by itself where it is yet to be initialised from what the
        ones before it leave over, and where residuals aren't what it compares."""
        pending = learning and any(not layer._codebook._ready for layer in self._levels)
        return not (pending or len(set(self.codebook_sizes)) > 1 or self._levels[0].use_cosine_sim)

    def _kept_levels(self, seed: int | None) -> int:
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        return kept_levels(
            self.num_quantizers,
            cutoff_index=self.quantize_dropout_cutoff_index,
            multiple_of=self.quantize_dropout_multiple_of,
            seed=seed,
        )

    def _project_out(self, total: Tensor, indices: Tensor) -> Tensor:
        if not isinstance(self.project_out, nn.Linear):
            return total
        projected = self.project_out(total.to(self.project_out.weight.dtype))
        return projected.masked_fill((indices < 0).all(-1, keepdim=True), 0)  # else the bias would stand alone

    def _layout(self, x: Tensor) -> Layout:
        spatial = (2,) if self.accept_image_fmap else None
        return Layout.of(x, self.dim, channel_first=self.accept_image_fmap, spatial=spatial)
