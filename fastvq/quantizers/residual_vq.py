"""Residual quantization: a stack of codebooks, each for what the ones before it left over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..codebook import Codebook, learn_together
from ..functional import residual_quantize
from ..health import Monitored
from ..ops import residual_search
from ..parts.beam import Level, beam_search
from ..parts.dropout import Kept, QuantizeDropout
from ..parts.estimators import directional_reparam, scale_gradient
from ..parts.implicit import NeuralCodes
from ..parts.layout import Layout, codes_layout
from ..parts.projection import projected_out, projections
from ..parts.rows import keep_finite, mark_bad
from ..parts.tables import Implicit, Shared, Table
from ..recompute import History, Repeatable
from .vector_quantize import VectorQuantize


class ResidualVQ(Repeatable, Monitored, nn.Module):
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
            of those before (`fastvq.parts.implicit`); codes and networks learn by gradient.
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
        if not sizes or (num_quantizers is not None and num_quantizers != len(sizes)):
            raise ValueError(f"num_quantizers: must be the number of levels, at least 1, got {num_quantizers}")
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
        dropout = QuantizeDropout(
            len(sizes), quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        )
        dropout.check()
        if shared_codebook:
            settings["manual_ema_update"] = False  # it follows at the end anyway
            settings["manual_in_place_optimizer_update"] = True
        if diveq or implicit_neural_codebook:
            settings.update(learnable_codebook=True, ema_update=False)
        if diveq:
            settings.update(route_gradients_to_input=False, commitment_weight=0.0)
        codebook_dim = dim if codebook_dim is None else codebook_dim

        self.dim, self.codebook_dim = dim, codebook_dim
        self.num_quantizers, self.codebook_sizes = len(sizes), sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
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
    def _learning_codebooks(self) -> list[Codebook]:
        return list(dict.fromkeys(level._codebook for level in self._levels))

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
        kept = self._dropout.draw(self.training and targets is None, x, rand_quantize_dropout_fixed_seed)
        learning = self.training and not (freeze_codebook or self._levels[0].freeze_codebook)
        if learning:
            self._begin_pass(projected)
        if learning and not self._ready:
            self._initialise_levels(projected.detach(), flat_mask)
        given = self._given(projected, flat_mask, beam_size, kept, sample_codebook_temp)
        if targets is None and self._all_at_once(learning):
            total, found, losses = self._all_levels(
                projected, flat_mask, learning, kept, given, accumulate_only=accum_ema_update
            )
        else:
            total, found, losses = self._level_by_level(
                projected,
                flat_mask,
                learning,
                kept,
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
        dropped = self.num_quantizers - found.shape[-1]
        found = nn.functional.pad(found, (0, dropped), value=-1).view(*rows.shape[:2], self.num_quantizers)
        losses = nn.functional.pad(losses, (0, dropped))

        quantized = projected_out(
            self.project_out, total.view(*rows.shape[:2], self.codebook_dim), (found >= 0).any(-1)
        ).to(x.dtype)
        if rows_mask is not None and not self.return_zeros_for_masked_padding:
            quantized = torch.where(rows_mask[..., None], quantized, rows)
        if targets is not None:
            return layout.from_rows(quantized), losses.sum()
        result = (layout.from_rows(quantized), layout.indices(found), losses)
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result

    def _all_levels(
        self,
        x: Tensor,
        mask: Tensor | None,
        learning: bool,
        kept: Kept,
        given: Tensor | None,
        *,
        accumulate_only: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized (1, R, D), indices (1, R, kept) and losses (kept,) of all levels in one pass; then each learns."""
        first = self._levels[0]
        levels = [level for place, level in enumerate(self._levels) if not kept.drops(place)]
        codebooks = torch.stack([level._codebook.codes[0].detach() for level in levels])
        found = (
            given[0, :, : len(levels)]
            if given is not None
            else residual_search(x[0].detach(), codebooks, mask=_only(mask))
        )
        found = torch.stack([kept.mask(place, one, -1) for place, one in enumerate(found.unbind(-1))], -1)
        quantized, _, errors, residuals = residual_quantize(
            x[0] if self.training else x[0].detach(),
            codebooks,
            gradient="rotation" if first.rotation_trick else "ste",
            commitment_weight=1.0,
            indices=found,
            keep_residuals=learning,
            copy_codebooks=False,
        )
        chosen = found.T[:, None]  # [Q, 1, R]
        if self.training:
            for level, one, error in zip(levels, chosen, errors.detach(), strict=True):
                level._health.observe_(one, error)
        if learning:
            self._note_pass(x)
            self._learn(levels, residuals[:, None], chosen, kept, accumulate_only)
        if self.training:
            errors = errors * first.commitment_weight if first.has_commitment_loss else torch.zeros_like(errors)
        return quantized[None], found[None], errors

    def _level_by_level(
        self,
        x: Tensor,
        mask: Tensor | None,
        learning: bool,
        kept: Kept,
        given: Tensor | None,
        *,
        shape: tuple[int, int],
        targets: Tensor | None,
        temperature: float | None,
        accumulate_only: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, where each level must search by itself or does more than search. The losses are cross entropies
        with targets (1, R, Q), if there are any."""
        residual = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        start, total = residual, torch.zeros_like(residual)
        levels, steps = [], []
        for place, level in enumerate(self._levels):
            if kept.drops(place):
                break
            step = level.quantize_rows(
                level.inputs(residual),
                kept.rows(place, mask, residual),
                shape=shape,
                learning=learning,
                indices=None if given is None else kept.mask(place, given[..., place], -1),
                targets=None if targets is None else targets[..., place],
                temperature=temperature,
                table=self._table(place, total),
            )
            residual = residual - scale_gradient(step.quantized, self.quant_grad_frac)
            total = total + step.quantized
            levels.append(level)
            steps.append(step)
        found = torch.stack([step.indices for step in steps], -1)
        if self.diveq and self.training:  # before learning draws random numbers, which a repeated pass doesn't
            absent = (found < 0).all(-1, keepdim=True)
            total = directional_reparam(start.masked_fill(absent, 0), total).masked_fill(absent, 0)
        if learning:
            self._note_pass(x)
        open_steps = [place for place, step in enumerate(steps) if not step.learned]
        if learning and open_steps:
            self._learn(
                [levels[place] for place in open_steps],
                [steps[place].inputs.detach() for place in open_steps],
                [steps[place].indices for place in open_steps],
                kept,
                accumulate_only,
            )
        if learning and self.shared_codebook:
            levels[0].update_in_place_optimizer()
        if targets is not None:
            losses = [step.cross_entropy for step in steps if step.cross_entropy is not None]
        elif self.training:
            losses = [
                kept.mask(place, level.losses(step)[0], 0)
                for place, (level, step) in enumerate(zip(levels, steps, strict=True))
            ]
        else:
            losses = [step.commitment for step in steps]
        return total, found, torch.stack(losses)

    def _learn(
        self,
        levels: list[VectorQuantize],
        inputs: Tensor | list[Tensor],
        indices: Tensor | list[Tensor],
        kept: Kept,
        accumulate_only: bool,
    ) -> None:
        """Moves the codebooks to their inputs (1, R, D), with indices (1, R)."""
        weights = None
        if isinstance(kept.levels, Tensor):  # a level left out doesn't decay
            weights = [(kept.levels > self._levels.index(level)).float() for level in levels]
        codebooks = [level._codebook for level in levels]
        learn_together(codebooks, inputs, indices, weight=weights, accumulate_only=accumulate_only)

    @torch.no_grad()
    def commit_ema_update(self) -> None:
        """One step of all levels' averages with what `forward(..., accum_ema_update=True)` has kept, if it has."""
        held = [codebook for codebook in self._learning_codebooks if codebook.held_counts is not None]
        none = [codebook.embed.new_zeros(1, 0, self.codebook_dim) for codebook in held]
        learn_together(held, none, [rows.new_zeros(1, 0, dtype=torch.int64) for rows in none])

    def _given(
        self, x: Tensor, mask: Tensor | None, beam_size: int | None, kept: Kept, temperature: float | None
    ) -> Tensor | None:
        """The indices (1, R, levels) that a beam search finds, or None for the greedy search."""
        own = self.beam_size if self.training else self.eval_beam_size
        beams = own if beam_size is None else beam_size
        if beams is None or beams <= 1:
            return None
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        levels = [self._beam_level(place, temperature) for place in range(self.num_quantizers) if not kept.drops(place)]
        weights: Sequence[float] | Tensor = self.beam_score_weights[: len(levels)]
        if isinstance(kept.levels, Tensor):  # beyond the last level that is kept, the best way stays the first
            places = torch.arange(len(levels), device=x.device)
            weights = x.new_tensor(self.beam_score_weights, dtype=torch.float64) * (places < kept.levels)
        return beam_search(x[0], levels, beams, weights=weights, mask=_only(mask))[None]

    def _beam_level(self, place: int, temperature: float | None = None) -> Level:
        level = self._levels[place]
        temperature = level.sample_codebook_temp if temperature is None else temperature

        def propose(residuals: Tensor, totals: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
            codes, make = level._codebook.codes.detach(), self._table(place, totals[None])
            table = Shared(codes, level._codebook.metric) if make is None else make(codes)
            inputs, own_mask = level.inputs(residuals[None]), None if mask is None else mask[None]
            indices = level.choose(table, inputs, own_mask, min(k, table.size), temperature)
            return indices[0], table.lookup(indices)[0], inputs[0]

        return propose

    def _table(self, place: int, total: Tensor) -> Callable[[Tensor], Table] | None:
        """What makes the table of a level from its codes, given the sum (1, R, D) of those before."""
        network = self.mlps[place - 1] if place > 0 else None
        if network is None:
            return None
        metric = self._levels[place]._codebook.metric
        return lambda codes: Implicit(codes, cast(NeuralCodes, network), total, metric)

    def _initialise_levels(self, x: Tensor, mask: Tensor | None) -> None:
        """k-means, a level at a time, on what the greedy search leaves over."""
        residual = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        total = torch.zeros_like(residual)
        for place, level in enumerate(self._levels):
            inputs = level.inputs(residual)
            if not level._codebook._ready:
                level._codebook.initialise_(inputs, mask)
            codes, make = level._codebook.codes.detach(), self._table(place, total)
            table = Shared(codes, level._codebook.metric) if make is None else make(codes)
            chosen = table.lookup(table.nearest(inputs, mask)).detach()
            residual, total = residual - chosen, total + chosen

    @property
    def _ready(self) -> bool:
        return all(level._codebook._ready for level in self._levels)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices alone, of all levels, shaped as `forward` returns them. Touches no state."""
        layout = self._layout(x)
        rows_mask = layout.rows_mask(mask)
        flat_mask = None if rows_mask is None else rows_mask.reshape(1, -1)
        projected = self._projected_in(layout.to_rows(x)).detach()
        found = self._given(projected, flat_mask, self.eval_beam_size, Kept(self.num_quantizers), 0.0)
        if found is None:
            found = self._greedy(projected, flat_mask)
        return layout.indices(found.view(layout.batch, layout.rows, self.num_quantizers))

    def _greedy(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The indices (1, R, Q) of x (1, R, D)."""
        if self._plain:
            codebooks = torch.stack([level._codebook.codes[0].detach() for level in self._levels])
            return residual_search(x[0], codebooks, mask=_only(mask))[None]
        return beam_search(
            x[0].float() if x.dtype != torch.float64 else x[0],
            [self._beam_level(place, 0.0) for place in range(self.num_quantizers)],
            1,
            mask=_only(mask),
        )[None]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes (Q, ..., D) of indices (..., Q), zeros for -1. Indices of the first levels alone will do."""
        if not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"indices: must have shape (..., 1 to {self.num_quantizers} levels), got {tuple(indices.shape)}"
            )
        flat = indices.flatten(0, -2)[None]
        total = self._levels[0]._codebook.embed.new_zeros(1, flat.shape[1], self.codebook_dim)
        codes: list[Tensor] = []
        for place, level in enumerate(self._levels):
            if place >= indices.shape[-1]:
                codes.append(torch.zeros_like(codes[0]))
                continue
            make = self._table(place, total)
            table = Shared(level._codebook.codes) if make is None else make(level._codebook.codes)
            codes.append(table.lookup(flat[..., place]))
            total = total + codes[-1]
        return torch.stack(codes).view(self.num_quantizers, *indices.shape[:-1], self.codebook_dim)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives as quantized for these indices, vectors last unless accept_image_fmap."""
        total = self.get_codes_from_indices(indices).sum(0)
        return codes_layout(projected_out(self.project_out, total, (indices >= 0).any(-1)), self.accept_image_fmap)

    @property
    def _plain(self) -> bool:
        """Whether one pass can search all levels: they compare residuals themselves with codes of one number."""
        first = self._levels[0]
        return self.uniform_codebook_size and not (first.use_cosine_sim or self.implicit_neural_codebook)

    def _all_at_once(self, learning: bool) -> bool:
        """Whether a forward pass can take all levels at once."""
        return self._plain and self.quant_grad_frac == 0 and self._levels[0].is_plain(self.training, learning)

    def _projected_in(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rows (B, N, dim) as the levels see them, (1, R, D); where they are projected, NaN for what isn't finite, and
        outside of the mask (B, N)."""
        if not self.has_projections:
            return rows.flatten(0, 1)[None]
        rows, counts = keep_finite(rows, mask)
        projected = self.project_in(rows)
        if projected.dtype in (torch.float16, torch.bfloat16):
            projected = projected.float()  # what is projected back isn't rounded in between
        return mark_bad(projected, counts).flatten(0, 1)[None]

    @property
    def _dropout(self) -> QuantizeDropout:
        return QuantizeDropout(
            self.num_quantizers,
            self.quantize_dropout,
            self.quantize_dropout_cutoff_index,
            self.quantize_dropout_multiple_of,
        )

    def _layout(self, x: Tensor) -> Layout:
        spatial = (2,) if self.accept_image_fmap else None
        return Layout.of(x, self.dim, channel_first=self.accept_image_fmap, spatial=spatial)


def _only(mask: Tensor | None) -> Tensor | None:
    """(1, R) as (R,)."""
    return None if mask is None else mask[0]
