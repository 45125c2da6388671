"""What a `VectorQuantize` does between its projections, on rows: `ResidualVQ` has levels do it, layouts left aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvq.codebook import Codebook
from fastvq.codebook.health import Monitored
from fastvq.codebook.in_place import InPlaceStep
from fastvq.codebook.recompute import Repeatable, recomputing
from fastvq.functional.quantize import lookup, unit_norm
from fastvq.parts.gradients import Estimator
from fastvq.parts.losses import orthogonality, used_codes
from fastvq.parts.masking import exclude_non_finite, nan_fill
from fastvq.parts.projection import project_codes_out
from fastvq.parts.shapes import Heads
from fastvq.parts.tables import PerRow, Shared, Table
from fastvq.precision import full_precision


class LossBreakdown(NamedTuple):
    """The losses of a `VectorQuantize`, without their weights; zero where they have none."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class Step(NamedTuple):
    """What the rows of a batch become, before the codebook learns from them. C codebooks, R rows each."""

    inputs: Tensor  # (C, R, D), as they are compared with the codes
    table: Table
    quantized: Tensor  # (C, R, D), or (C, R, k, D) for top-k
    indices: Tensor  # (C, R), or (C, R, k)
    commitment: Tensor  # () or, for top-k, (C, R, k)
    diversity: Tensor | None  # (), where it is asked for
    cross_entropy: Tensor | None  # (), with targets
    in_place: Tensor | None  # (), with an in-place optimizer
    learned: bool  # whether the codebook has learned from them already
    learning: bool  # whether it may change


class RowQuantizer(Repeatable, Monitored, nn.Module):
    """The settings that `VectorQuantize` documents, and what they make of rows (C, R, D): C codebooks, R rows each."""

    _codebook: Codebook
    _heads: Heads
    _in_place: InPlaceStep | None
    project_in: nn.Module
    project_out: nn.Module
    has_projections: bool
    codebook_size: int
    codebook_dim: int
    heads: int
    separate_codebook_per_head: bool
    use_cosine_sim: bool
    learnable_codebook: bool
    commitment_weight: float
    has_commitment_loss: bool
    commitment_use_cross_entropy_loss: bool
    orthogonal_reg_weight: float
    orthogonal_reg_active_codes_only: bool
    orthogonal_reg_max_codes: int | None
    codebook_diversity_loss_weight: float
    codebook_diversity_temperature: float
    stochastic_sample_codes: bool
    sample_codebook_temp: float
    straight_through: bool
    rotation_trick: bool
    directional_reparam: bool
    directional_reparam_variance: float
    sync_update_v: float
    route_gradients_to_input: bool
    manual_in_place_optimizer_update: bool

    @property
    def _learning_codebooks(self) -> list[Codebook]:
        return [self._codebook]

    @property
    def ema_update(self) -> bool:
        """Whether the codebook follows moving averages."""
        return self._codebook.ema_update

    @property
    def in_place_codebook_optimizer(self) -> torch.optim.Optimizer | None:
        """What `in_place_codebook_optimizer` made."""
        return None if self._in_place is None else self._in_place.optimizer

    def inputs(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rows (B, N, dim) as the codebooks see them, (C, R, D): projected, split, and of unit length for cosine
        similarity; NaN for what isn't finite, and outside of the mask (B, N)."""
        if not (self.has_projections or self.use_cosine_sim or self.heads > 1):
            return self._heads.split(rows)
        rows, counts = exclude_non_finite(rows, mask)
        split = self._heads.split(self.project_in(rows))
        split = unit_norm(split.float()) if self.use_cosine_sim else split
        marks = self._heads.split_mask(counts)
        assert marks is not None
        return nan_fill(split, marks)

    def quantize_rows(
        self,
        x: Tensor,
        mask: Tensor | None,
        *,
        shape: tuple[int, int],
        learning: bool,
        topk: int | None = None,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float | None = None,
        table: Callable[[Tensor], Table] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Step:
        """`forward` between the projections, without the learning.

        Args:
            x: `inputs` (C, R, D). mask: bool (C, R), or None. shape: (B, N), the vectors that the rows are parts of.
            learning: whether the codebook may change: by k-means, affine statistics or its in-place optimizer.
            topk: codes for each row.
            indices: (C, R), where they are known already.
            targets: (C, R), to take the cross entropy with.
            temperature: instead of sample_codebook_temp.
            table: makes the table of the codes (C, K, D).
            transform: codebook_transform_fn.
        """
        if learning:
            self._codebook.initialise_(x.detach(), mask)
        pulled = self.learnable_codebook and learning

        temperature = self.sample_codebook_temp if temperature is None else temperature

        def current() -> Table:
            if self._codebook.vq_bridge is None:
                codes = self._codebook.codes
            else:
                with full_precision(x):
                    codes = self._codebook.codes
            if not (learning and codes.requires_grad):
                codes = codes.detach()
            elif self._is_soft or targets is not None:
                codes = codes.clone()  # which the backward pass meets as they are now
            if transform is not None:
                return PerRow(transform(codes).reshape(*x.shape[:2], *codes.shape[1:]), self._codebook.metric)
            return Shared(codes, self._codebook.metric) if table is None else table(codes)

        where = current()
        chosen = self.choose(where, x, mask, topk, temperature) if indices is None else indices
        in_place, learned = None, False
        if self._in_place is not None and learning and not recomputing():
            self._codebook.learn_(x.detach(), chosen)
            learned = True
            estimator = self._estimator(temperature)
            self._in_place.follow(self._codebook.parameters())
            in_place = self._in_place.backward(
                lambda: estimator.output(x.detach(), current(), chosen, pulled=True).error
            )
            if not self.manual_in_place_optimizer_update:
                self.update_in_place_optimizer()
            where = current()
            chosen = self.choose(where, x, mask, topk, temperature) if indices is None else indices
        # In eval nothing flows back, as in vector_quantize_pytorch.
        estimator = self._estimator(temperature)
        quantized, error = estimator.output(x if self.training else x.detach(), where, chosen, pulled=pulled)
        if self.training and topk is None:
            self._health.observe_(chosen if self.separate_codebook_per_head else chosen.flatten(), error.detach())
        diversity = None
        if self.training and self.codebook_diversity_loss_weight > 0:
            diversity = -where.positional_entropy(x, shape, self.codebook_diversity_temperature, mask)
        if self.training and self.commitment_use_cross_entropy_loss and self.has_commitment_loss and topk is None:
            error = where.cross_entropy(x, chosen)
        entropy = (
            None
            if targets is None
            else where.cross_entropy(x, targets if mask is None else targets.masked_fill(~mask, -1))
        )
        return Step(
            x, where, quantized, chosen, error, diversity, entropy, in_place, learned=learned, learning=learning
        )

    def losses(self, step: Step) -> tuple[Tensor, LossBreakdown]:
        """The loss of a step, () or that of each code for top-k, and what it is made of; after the codebook's learning,
        since orthogonality is that of the codes to come."""
        commitment = orthogonal = zero = step.commitment.new_zeros(())
        loss = zero if step.commitment.dim() == 0 else torch.zeros_like(step.commitment)
        by_code = step.indices.dim() == 3  # top-k: told in eval too
        if self.has_commitment_loss and (self.training or by_code):
            commitment = step.commitment
            loss = commitment if self.commitment_weight == 1 else commitment * self.commitment_weight
        elif by_code and not self.training:
            loss = commitment = step.commitment
        if step.diversity is not None:
            loss = loss + step.diversity * self.codebook_diversity_loss_weight
        if self.training and self.orthogonal_reg_weight > 0:
            used = None
            if self.orthogonal_reg_active_codes_only:
                used = used_codes(step.indices.flatten(1), self.codebook_size)
            # A copy, since the codes may move before the backward pass.
            codes = self._codebook.embed.clone() if step.learning else self._codebook.embed.detach()
            orthogonal = orthogonality(codes, used, most=self.orthogonal_reg_max_codes)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        diversity, in_place = (zero if each is None else each for each in (step.diversity, step.in_place))
        return loss, LossBreakdown(commitment, diversity, orthogonal, in_place)

    def choose(self, table: Table, x: Tensor, mask: Tensor | None, topk: int | None, temperature: float) -> Tensor:
        """Indices (C, R), or (C, R, k) for top-k, of x (C, R, D): the nearest codes, or random ones."""
        x = x.detach()
        if self.training and self.stochastic_sample_codes and temperature > 0:
            return table.draw(x, temperature, topk, mask)
        return table.nearest(x, mask) if topk is None else table.nearest_k(x, topk, mask)

    def is_plain(self, training: bool, learning: bool) -> bool:
        """Whether a forward pass only searches, looks up, and passes the gradient on to x."""
        if not training:
            return True
        passes_on = self.route_gradients_to_input and not self.directional_reparam
        only_searches = not (self.orthogonal_reg_weight or self.stochastic_sample_codes or self._is_soft)
        moves = learning and (self.learnable_codebook or self._codebook.affine is not None)
        return passes_on and only_searches and not moves

    @property
    def _is_soft(self) -> bool:
        """Whether training takes a loss of the soft assignment."""
        entropy = self.commitment_use_cross_entropy_loss and self.has_commitment_loss
        return entropy or self.codebook_diversity_loss_weight > 0

    def _estimator(self, temperature: float) -> Estimator:
        kind = "rotation" if self.rotation_trick else "directional" if self.directional_reparam else "ste"
        soft = temperature if self.straight_through and self.training and temperature > 0 else None
        return Estimator(
            kind, self.directional_reparam_variance, self.sync_update_v, self.route_gradients_to_input, soft
        )

    def _decode(self, indices: Tensor) -> Tensor:
        heads = self._heads
        if heads.number == 1:
            return lookup(self._codebook.codes[0], indices)
        if indices.shape[-1:] != (heads.number,):
            raise ValueError(f"indices: must have shape (..., H={heads.number}), got {tuple(indices.shape)}")
        flat = indices.flatten(0, -2)[None]
        codes = Shared(self._codebook.codes).lookup(heads.split_indices(flat))
        return heads.join(codes, 1, flat.shape[1]).view(*indices.shape[:-1], heads.number * self.codebook_dim)

    def _projected_out(self, codes: Tensor, indices: Tensor) -> Tensor:
        if not self.has_projections:
            return codes
        absent = indices < 0
        return project_codes_out(self.project_out, codes, ~(absent.all(-1) if self.heads > 1 else absent))

    def commit_ema_update(self) -> None:
        """One step of the moving averages with what `forward(..., accum_ema_update=True)` has kept, if it has."""
        self._codebook.commit_()

    def update_in_place_optimizer(self) -> None:
        """Steps the in-place optimizer with the gradients gathered, over all ranks."""
        if self._in_place is not None:
            self._in_place.step(self._codebook.together())
