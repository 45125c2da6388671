"""What a `ResidualVQ` does between its projections, on rows: search, gradient and learning of all levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastvq.codebook import Codebook, learn_together
from fastvq.codebook.health import observe_levels_
from fastvq.codebook.recompute import Repeatable
from fastvq.functional.residual_quantize import residual_quantize
from fastvq.ops import residual_search
from fastvq.parts.beam import Stage, beam_search
from fastvq.parts.dropout import ActiveStages
from fastvq.parts.gradients import directional_reparam, scale_gradient
from fastvq.parts.tables import Implicit, NeuralCodes, Shared, Table

from .levels import Levels
from .vector_quantize import VectorQuantize


class ResidualRows(Repeatable, Levels[VectorQuantize]):
    """The settings that `ResidualVQ` documents, and what they make of rows (1, R, D)."""

    codebook_dim: int
    uniform_codebook_size: bool
    shared_codebook: bool
    implicit_neural_codebook: bool
    mlps: nn.ModuleList | tuple[None, ...]
    diveq: bool
    quant_grad_frac: float
    beam_size: int | None
    eval_beam_size: int | None
    beam_score_weights: tuple[float, ...]

    @property
    def _learning_codebooks(self) -> list[Codebook]:
        return list(dict.fromkeys(level._codebook for level in self._levels))

    def _all_levels(
        self,
        x: Tensor,
        mask: Tensor | None,
        learning: bool,
        active: ActiveStages,
        given: Tensor | None,
        *,
        accumulate_only: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized (1, R, D), indices (1, R, kept) and losses (kept,) of all levels in one pass; then each learns."""
        first = self._levels[0]
        levels = [level for place, level in enumerate(self._levels) if not active.skips(place)]
        codebooks = _stacked(levels)
        found = (
            given[0, :, : len(levels)]
            if given is not None
            else residual_search(x[0].detach(), codebooks, mask=_only(mask))
        )
        if isinstance(active.number, Tensor):
            found = torch.stack([active.fill(place, one, -1) for place, one in enumerate(found.unbind(-1))], -1)
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
            observe_levels_([level._health for level in levels], chosen, errors)
        if learning:
            self._note_pass(x)
            self._learn(levels, residuals[:, None], chosen, active, accumulate_only)
        if self.training and not first.has_commitment_loss:
            errors = torch.zeros_like(errors)
        elif self.training and first.commitment_weight != 1:
            errors = errors * first.commitment_weight
        return quantized[None], found[None], errors

    def _level_by_level(
        self,
        x: Tensor,
        mask: Tensor | None,
        learning: bool,
        active: ActiveStages,
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
            if active.skips(place):
                break
            step = level.quantize_rows(
                level.inputs(residual),
                active.row_mask(place, mask, residual),
                shape=shape,
                learning=learning,
                indices=None if given is None else active.fill(place, given[..., place], -1),
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
                active,
                accumulate_only,
            )
        if learning and self.shared_codebook:
            levels[0].update_in_place_optimizer()
        if targets is not None:
            losses = [step.cross_entropy for step in steps if step.cross_entropy is not None]
        elif self.training:
            losses = [
                active.fill(place, level.losses(step)[0], 0)
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
        active: ActiveStages,
        accumulate_only: bool,
    ) -> None:
        """Moves the codebooks to their inputs (1, R, D), with indices (1, R)."""
        weights = None
        if isinstance(active.number, Tensor):  # a level left out doesn't decay
            weights = [(active.number > self._levels.index(level)).float() for level in levels]
        codebooks = [level._codebook for level in levels]
        learn_together(codebooks, inputs, indices, weight=weights, accumulate_only=accumulate_only)

    @torch.no_grad()
    def commit_ema_update(self) -> None:
        """One step of all levels' averages with what `forward(..., accum_ema_update=True)` has kept, if it has."""
        held = [codebook for codebook in self._learning_codebooks if codebook.held_counts is not None]
        none = [codebook.embed.new_zeros(1, 0, self.codebook_dim) for codebook in held]
        learn_together(held, none, [rows.new_zeros(1, 0, dtype=torch.int64) for rows in none])

    def _given(
        self, x: Tensor, mask: Tensor | None, beam_size: int | None, active: ActiveStages, temperature: float | None
    ) -> Tensor | None:
        """The indices (1, R, levels) that a beam search finds, or None for the greedy search."""
        own = self.beam_size if self.training else self.eval_beam_size
        beams = own if beam_size is None else beam_size
        if beams is None or beams <= 1:
            return None
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        levels = [
            self._beam_level(place, temperature) for place in range(self.num_quantizers) if not active.skips(place)
        ]
        weights: Sequence[float] | Tensor = self.beam_score_weights[: len(levels)]
        if isinstance(active.number, Tensor):  # beyond the last level that is kept, the best way stays the first
            places = torch.arange(len(levels), device=x.device)
            weights = x.new_tensor(self.beam_score_weights, dtype=torch.float64) * (places < active.number)
        return beam_search(x[0], levels, beams, weights=weights, mask=_only(mask))[None]

    def _beam_level(self, place: int, temperature: float | None = None) -> Stage:
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

    def _greedy(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The indices (1, R, Q) of x (1, R, D)."""
        if self._plain:
            return residual_search(x[0], _stacked(self._levels), mask=_only(mask))[None]
        return beam_search(
            x[0].float() if x.dtype != torch.float64 else x[0],
            [self._beam_level(place, 0.0) for place in range(self.num_quantizers)],
            1,
            mask=_only(mask),
        )[None]

    @property
    def _plain(self) -> bool:
        """Whether one pass can search all levels: they compare residuals themselves with codes of one number."""
        first = self._levels[0]
        return self.uniform_codebook_size and not (first.use_cosine_sim or self.implicit_neural_codebook)

    def _all_at_once(self, learning: bool) -> bool:
        """Whether a forward pass can take all levels at once."""
        return self._plain and self.quant_grad_frac == 0 and self._levels[0].is_plain(self.training, learning)


def _stacked(levels: list[VectorQuantize]) -> Tensor:
    """The codes (Q, K, D) of levels with one codebook each, without a gradient: a copy."""
    return torch.cat([level._codebook.codes for level in levels]).detach()


def _only(mask: Tensor | None) -> Tensor | None:
    """(1, R) as (R,)."""
    return None if mask is None else mask[0]
