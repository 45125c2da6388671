"""Residual quantization: a stack of codebooks, each for what the ones before it left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.codebook.recompute import History
from fastvq.parts.dropout import ActiveStages
from fastvq.parts.masking import exclude_non_finite, nan_fill
from fastvq.parts.projection import project_codes_out, projections
from fastvq.parts.shapes import Layout, codes_in_layout
from fastvq.parts.tables import NeuralCodes, Shared

from .residual_rows import ResidualRows
from .vector_quantize import VectorQuantize


class ResidualVQ(ResidualRows):
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
        diveq: learn the codes by `fastvq.parts.directional_reparam` between x and the sum of its codes, alone.
        heads: 1.
        quantize_dropout: in training, leave out the levels after a random one.
        quantize_dropout_cutoff_index: the first level that may be the last.
        quantize_dropout_multiple_of: the number of levels that are kept is rounded up to a multiple of it.
        accept_image_fmap: x is (B, dim, H, W).
        implicit_neural_codebook: every level but the first transforms its codes by a network, conditioned on the sum
            of those before (`fastvq.parts.tables`); codes and networks learn by gradient.
        mlp_kwargs: dim_hidden and depth of these networks.
        beam_size, eval_beam_size: ways that stay open in the search, in training and in eval (`fastvq.parts.beam`).
        beam_score_quantizer_weights: of each level's error in the search.
        quant_grad_frac: share of a level's gradient that the level before gets through the residual.
        return_zeros_for_masked_padding: masked vectors come back as zero; if False, as they were.
        settings: of every level's `VectorQuantize`: decay, kmeans_init, threshold_ema_dead_code ...

    Raises:
        ValueError: an argument that can't be, by name. TypeError: one that doesn't exist.

    Numerics: search is exact for residuals rounded to float32, whatever the dtype of x (`fastvq.residual_search`).

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1 and section III-C (dropout); the options' at their parts.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("num_quantizers: must be given where codebook_size is one number")
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        if num_quantizers is not None and num_quantizers != len(sizes):
            raise ValueError(f"num_quantizers: must be the number of levels, {len(sizes)}, got {num_quantizers}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size: must be one number where the codebook is shared, got {codebook_size}")
        if heads != 1:
            raise ValueError(f"heads: must be 1 for residual quantization, got {heads}")
        if implicit_neural_codebook and settings.get("codebook_diversity_loss_weight"):
            raise ValueError("codebook_diversity_loss_weight: must be 0 beside implicit_neural_codebook=True")
        if eval_beam_size is not None and beam_size is None:
            raise ValueError("beam_size: must be given beside eval_beam_size")
        for name, beams in (("beam_size", beam_size), ("eval_beam_size", eval_beam_size)):
            if beams is not None and beams < 1:
                raise ValueError(f"{name}: must be at least 1, got {beams}")
        weights = (1.0,) * len(sizes) if beam_score_quantizer_weights is None else tuple(beam_score_quantizer_weights)
        if len(weights) != len(sizes):
            raise ValueError(f"beam_score_quantizer_weights: must be {len(sizes)} numbers, got {weights}")
        if not 0 <= quant_grad_frac <= 1:
            raise ValueError(f"quant_grad_frac: must lie in [0, 1], got {quant_grad_frac}")
        self._set_dropout(len(sizes), quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        if shared_codebook:
            settings["manual_ema_update"] = False  # it follows at the end anyway
            settings["manual_in_place_optimizer_update"] = True
        if diveq or implicit_neural_codebook:
            settings.update(learnable_codebook=True, ema_update=False)
        if diveq:
            settings.update(route_gradients_to_input=False, commitment_weight=0.0)
        codebook_dim = dim if codebook_dim is None else codebook_dim

        self.dim, self.codebook_dim = dim, codebook_dim
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.accept_image_fmap = accept_image_fmap
        self.implicit_neural_codebook = implicit_neural_codebook
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.beam_score_weights = weights
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        self._history = History()
        self.project_in, self.project_out = projections(dim, codebook_dim)
        self.has_projections = codebook_dim != dim
        self.layers = nn.ModuleList([VectorQuantize(dim=codebook_dim, codebook_size=k, **settings) for k in sizes])
        if any(layer.has_projections for layer in self._levels):
            raise ValueError("codebook_dim: must be given to ResidualVQ itself")
        self.mlps = (
            nn.ModuleList([NeuralCodes(codebook_dim, **(mlp_kwargs or {})) for _ in sizes[1:]])
            if implicit_neural_codebook
            else (None,) * (len(sizes) - 1)
        )
        if shared_codebook:
            for layer in self._levels:
                layer._codebook = self._levels[0]._codebook
                layer._in_place = self._levels[0]._in_place

    @property
    def codebook_size(self) -> int:
        """K of the first level."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes of all levels, (Q, K, D), or a tuple of (K_q, D) where the sizes differ."""
        codes = tuple(layer.codebook for layer in self._levels)
        return torch.stack(codes) if self.uniform_codebook_size else codes

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
        *,
        lens: Tensor | None = None,
        accum_ema_update: bool = False,
    ) -> tuple[Tensor, ...]:
        """(quantized, indices, losses) of x, and all codes if asked for; with indices given, (quantized, the sum of the
        levels' cross entropies).

        Args:
            x: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, H, W) if accept_image_fmap. Any floating dtype.
            mask: bool, shaped as the vectors, as in `VectorQuantize`.
            indices: as this layer returns them, or a list of a tensor for each level: the loss is the cross entropy of
                each level's soft assignment to them, without those that are -1. Nothing is dropped then.
            return_all_codes: also return the codes of each level.
            sample_codebook_temp: for this call, instead of the levels' own.
            freeze_codebook: leave the codebooks as they are.
            beam_size: for this call, instead of the layer's own.
            rand_quantize_dropout_fixed_seed: decides where dropout cuts; by default torch's generator does.
            lens: int (B,), a mask for sequences: the first lens[b] vectors count.
            accum_ema_update: keep this batch's statistics for the next step of learning, or `commit_ema_update`.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, N, Q), (B, Q), (B, ..., Q) or (B, H, W, Q), -1 for
            levels dropped and vectors that don't count; losses (Q,) float32, zero for levels dropped; codes
            (Q, B, N, D).

        Raises:
            ValueError, TypeError: x or mask that don't fit.
        """
        layout = self._layout(x)
        rows = layout.to_rows(x)
        rows_mask = layout.rows_mask(mask, lens)
        flat_mask = None if rows_mask is None else rows_mask.reshape(1, -1)
        projected = self._projected_in(rows, rows_mask)
        if isinstance(indices, list):
            indices = torch.stack(indices, -1)
        if indices is not None and indices.shape[-1:] != (self.num_quantizers,):
            raise ValueError(f"indices: must have shape (..., Q={self.num_quantizers}), got {tuple(indices.shape)}")
        if beam_size is not None and not beam_size >= 1:
            raise ValueError(f"beam_size: must be at least 1, got {beam_size}")
        targets = None if indices is None else layout.indices_to_rows(indices).flatten(0, 1)[None]
        active = self._dropout.draw(self.training and targets is None, x, rand_quantize_dropout_fixed_seed)
        learning = self.training and not (freeze_codebook or self._levels[0].freeze_codebook)
        if learning:
            self._begin_pass(projected)
        if learning and not self._ready:
            self._initialise_levels(projected.detach(), flat_mask)
        given = self._given(projected, flat_mask, beam_size, active, sample_codebook_temp)
        if targets is None and self._all_at_once(learning):
            total, found, losses = self._all_levels(
                projected, flat_mask, learning, active, given, accumulate_only=accum_ema_update
            )
        else:
            total, found, losses = self._level_by_level(
                projected,
                flat_mask,
                learning,
                active,
                given,
                shape=(layout.batch, layout.rows),
                targets=targets,
                temperature=sample_codebook_temp,
                accumulate_only=accum_ema_update,
            )
        if learning:
            self._end_pass()
        if targets is None and given is not None and not self.training:
            weight = self._levels[0].commitment_weight
            losses = losses * weight if weight else losses
        elif targets is None and not self.training:
            losses = torch.zeros_like(losses)
        if dropped := self.num_quantizers - found.shape[-1]:
            found = nn.functional.pad(found, (0, dropped), value=-1)
            losses = nn.functional.pad(losses, (0, dropped))
        found = found.view(*rows.shape[:2], self.num_quantizers)

        quantized = total.view(*rows.shape[:2], self.codebook_dim)
        if self.has_projections:
            quantized = project_codes_out(self.project_out, quantized, (found >= 0).any(-1))
        quantized = quantized.to(x.dtype)
        if rows_mask is not None and not self.return_zeros_for_masked_padding:
            quantized = torch.where(rows_mask[..., None], quantized, rows)
        if targets is not None:
            return layout.from_rows(quantized), losses.sum()
        result = (layout.from_rows(quantized), layout.indices(found), losses)
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices alone, of all levels, shaped as `forward` returns them. Touches no state."""
        layout = self._layout(x)
        rows_mask = layout.rows_mask(mask)
        flat_mask = None if rows_mask is None else rows_mask.reshape(1, -1)
        projected = self._projected_in(layout.to_rows(x)).detach()
        found = self._given(projected, flat_mask, self.eval_beam_size, ActiveStages(self.num_quantizers), 0.0)
        if found is None:
            found = self._greedy(projected, flat_mask)
        return layout.indices(found.view(layout.batch, layout.rows, self.num_quantizers))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes (Q, ..., D) of indices (..., Q), zeros for -1. Indices of the first levels alone will do."""
        return self._codes(self._checked_levels(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives as quantized for these indices, vectors last unless accept_image_fmap."""
        indices = self._checked_levels(indices)
        total = self._codes(indices).sum(0)
        if self.has_projections:
            total = project_codes_out(self.project_out, total, (indices >= 0).any(-1))
        return codes_in_layout(total, self.accept_image_fmap)

    def _codes(self, indices: Tensor) -> Tensor:
        """The codes (Q, ..., D) of indices (..., 1 to Q), zeros for levels that aren't there."""
        if self.implicit_neural_codebook:
            codes = self._implicit_codes(indices)
        else:
            chosen = zip(self._levels, indices.clamp_min(0).unbind(-1), strict=False)
            codes = torch.stack([nn.functional.embedding(one, level._codebook.codes[0]) for level, one in chosen])
            codes = codes.masked_fill((indices < 0).movedim(-1, 0).unsqueeze(-1), 0)
        missing = self.num_quantizers - len(codes)
        return torch.cat([codes, codes.new_zeros(missing, *codes.shape[1:])]) if missing else codes

    def _implicit_codes(self, indices: Tensor) -> Tensor:
        """The codes (levels, ..., D) of indices (..., levels), each level's with the sum of those before."""
        total = self._levels[0]._codebook.embed.new_zeros(1, indices[..., 0].numel(), self.codebook_dim)
        codes: list[Tensor] = []
        for place, one in enumerate(indices.unbind(-1)):
            codebook, make = self._levels[place]._codebook.codes, self._table(place, total)
            table = Shared(codebook) if make is None else make(codebook)
            codes.append(table.lookup(one.flatten()[None]))
            total = total + codes[-1]
        return torch.stack(codes).view(len(codes), *indices.shape[:-1], self.codebook_dim)

    def _projected_in(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rows (B, N, dim) as the levels see them, (1, R, D); where they are projected, NaN for what isn't finite, and
        outside of the mask (B, N)."""
        if not self.has_projections:
            return rows.reshape(1, rows.shape[0] * rows.shape[1], rows.shape[2])
        rows, counts = exclude_non_finite(rows, mask)
        projected = self.project_in(rows)
        if projected.dtype in (torch.float16, torch.bfloat16):
            projected = projected.float()  # what is projected back isn't rounded in between
        return nan_fill(projected, counts).flatten(0, 1)[None]

    def _layout(self, x: Tensor) -> Layout:
        spatial = (2,) if self.accept_image_fmap else None
        return Layout.of(x, self.dim, channel_first=self.accept_image_fmap, spatial=spatial)
