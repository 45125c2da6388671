"""Residual quantization: a stack of codebooks, each for what the ones before it left over."""

from __future__ import annotations

import math
import random
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..functional import lookup
from ..ops import residual_search
from .vector_quantize import VectorQuantize


class ResidualVQ(nn.Module):
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
        if not 0 <= quantize_dropout_cutoff_index < len(sizes):
            raise ValueError(
                f"quantize_dropout_cutoff_index: must lie in [0, {len(sizes)}), got {quantize_dropout_cutoff_index}"
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(f"quantize_dropout_multiple_of: must be at least 1, got {quantize_dropout_multiple_of}")
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
            x: (B, N, dim) or (B, dim); (B, dim, H, W) if accept_image_fmap. Any floating dtype.
            mask: bool (B, N), as in `VectorQuantize`.
            return_all_codes: also return the codes of each level.
            freeze_codebook: leave the codebooks as they are.
            rand_quantize_dropout_fixed_seed: decides where dropout cuts; by default torch's generator does.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, N, Q), (B, Q) or (B, H, W, Q), -1 for levels dropped and
            vectors that don't count; losses (Q,) float32, zero for levels dropped; codes (Q, B, N, D).

        Raises:
            ValueError, TypeError: x or mask that don't fit.
        """
        rows = self._to_rows(x)
        if mask is not None and self.accept_image_fmap:
            raise ValueError("mask: is for sequences (B, N, dim), not for images")
        rows_mask = self._levels[0]._rows_mask(mask, None, rows)
        projected = self.project_in(rows)
        residual = projected.float() if projected.dtype in (torch.float16, torch.bfloat16) else projected
        kept = self._kept_levels(rand_quantize_dropout_fixed_seed)
        learning = self.training and not (freeze_codebook or self._levels[0].freeze_codebook)
        known = self._search(residual.detach(), learning, kept)
        total = torch.zeros_like(residual)
        levels, losses, residuals = [], [], []
        for q in range(kept):
            layer = self._levels[q]
            indices = known[..., q] if known is not None else None
            residuals.append(layer._project_in(residual.detach()))
            quantized, indices, loss = layer.quantize_rows(
                layer._project_in(residual), rows_mask, learning=learning and not self.shared_codebook, indices=indices
            )
            residual = residual - quantized.detach()
            total = total + quantized
            levels.append(indices)
            losses.append(loss)
        if learning and self.shared_codebook:
            self._levels[0]._codebook.learn_together_(
                [r.flatten(0, -2) for r in residuals], [i.flatten() for i in levels]
            )
        dropped = self.num_quantizers - kept
        levels += [torch.full_like(levels[0], -1)] * dropped
        losses += [torch.zeros_like(losses[0])] * dropped
        indices = torch.stack(levels, -1)
        quantized = self._from_rows(self._project_out(total, indices).to(x.dtype), x)
        indices = indices.reshape(x.shape[0], *x.shape[2:], -1) if self.accept_image_fmap else indices
        result = (quantized, indices, torch.stack(losses))
        return (*result, self.get_codes_from_indices(indices)) if return_all_codes else result

    def encode(self, x: Tensor) -> Tensor:
        """The indices alone, of all levels, shaped as `forward` returns them. Touches no state."""
        rows = self.project_in(self._to_rows(x)).detach()
        found = self._search(rows, False, self.num_quantizers)
        if found is None:
            levels, residual = [], rows.float() if rows.dtype != torch.float64 else rows
            for layer in self._levels:
                levels.append(layer.encode(residual))
                residual = residual - lookup(layer.codebook, levels[-1])
            found = torch.stack(levels, -1)
        return found.reshape(x.shape[0], *x.shape[2:], -1) if self.accept_image_fmap else found

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
        return total.movedim(-1, 1) if self.accept_image_fmap else total

    def _search(self, residual: Tensor, learning: bool, levels: int) -> Tensor | None:
        """Indices (..., levels) of all levels at once; None where each must search by itself, because it is yet to be
        initialised from what the ones before it leave over, or because residuals aren't what it compares."""
        pending = learning and any(not layer._codebook._ready for layer in self._levels)
        if pending or len(set(self.codebook_sizes)) > 1 or self._levels[0].use_cosine_sim:
            return None
        codebooks = torch.stack([layer.codebook.detach() for layer in self._levels[:levels]])
        found = residual_search(residual.flatten(0, -2), codebooks)
        return found.reshape(*residual.shape[:-1], levels)

    def _kept_levels(self, seed: int | None) -> int:
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        if seed is None:
            seed = int(torch.randint(10_000, ()))
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(math.ceil((last + 1) / multiple) * multiple, self.num_quantizers)

    def _project_out(self, total: Tensor, indices: Tensor) -> Tensor:
        if not isinstance(self.project_out, nn.Linear):
            return total
        projected = self.project_out(total.to(self.project_out.weight.dtype))
        return projected.masked_fill((indices < 0).all(-1, keepdim=True), 0)  # else the bias would stand alone

    def _to_rows(self, x: Tensor) -> Tensor:
        fits, shape = x.dim() in (2, 3) and x.shape[-1] == self.dim, "(B, N, dim) or (B, dim)"
        if self.accept_image_fmap:
            fits, shape = x.dim() == 4 and x.shape[1] == self.dim, "(B, dim, H, W)"
        if not fits:
            raise ValueError(f"x: must have shape {shape} with dim={self.dim}, got {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: must be floating point, got {x.dtype}")
        return x.flatten(2).transpose(1, 2) if self.accept_image_fmap else x

    def _from_rows(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(x.shape) if self.accept_image_fmap else rows
