"""The single-codebook vector quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..codebook import Codebook, Revival
from ..functional import unit_norm
from ..health import Health, Monitored
from ..parts.heads import Heads
from ..parts.in_place import InPlaceStep
from ..parts.layout import Layout, codes_layout
from ..parts.losses import orthogonality, used_codes
from ..parts.output import Estimator
from ..parts.projection import projected_out, projections
from ..parts.rows import keep_finite, mark_bad
from ..parts.tables import PerRow, Shared, Table
from ..precision import full_precision
from ..recompute import History, Repeatable, recomputing
from .settings import check_vector_quantize


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
    diversity: Tensor  # ()
    cross_entropy: Tensor | None  # (), with targets
    in_place: Tensor  # ()
    learned: bool  # whether the codebook has learned from them already
    learning: bool  # whether it may change


class VectorQuantize(Repeatable, Monitored, nn.Module):
    """Replaces each vector by its nearest code and learns the codebook, with the API of vector_quantize_pytorch.

        quantized = project_out(e_index),   index = argmin_k |project_in(x) - e_k|^2
        loss = commitment_weight * mean (project_in(x) - sg[e_index])^2 + the other losses     (zero in eval)

    In training the codebook follows the exponential moving averages of its vectors (`fastvq.ema_update_`), or the
    gradient if it is learnable; the output is that of the codebook from before the update. Vectors that are not
    finite get index -1 and a zero output, and touch neither loss nor codebook.

    Args:
        dim: dimension of the vectors that come in and go out.
        codebook_size: K.
        codebook_dim: D, the dimension of the codes; linear projections stand around the codebook where heads * D isn't
            dim.
        heads: parts of a vector that are coded by themselves, see `fastvq.parts.heads`.
        separate_codebook_per_head: each head has a codebook of its own.
        decay: of the moving averages, in [0, 1].
        eps: Laplace smoothing of the cluster sizes.
        freeze_codebook: leave the codebook as it is, bit for bit, in training too.
        kmeans_init: set the codebook by k-means on the first training batch; until then it is zero.
        kmeans_iters: rounds of that k-means.
        sync_kmeans: over all ranks.
        use_cosine_sim: compare directions: x and the codes are normalised and the largest product wins.
        layernorm_after_project_in: normalise what is projected in.
        threshold_ema_dead_code: codes whose moving cluster size falls below it are put on random vectors of the batch;
            0 for never.
        channel_last: vectors are (B, N, dim); if False, (B, dim, N).
        accept_image_fmap, accept_3d_fmap: x is (B, dim, H, W), or (B, dim, T, H, W).
        commitment_weight: beta; 0 for no loss.
        commitment_use_cross_entropy_loss: the commitment loss is the cross entropy of the soft assignment to the code
            that was chosen, `fastvq.cross_entropy`.
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: of
            `fastvq.parts.losses.orthogonality`, for all codes, those that this batch uses, or so many random ones.
        codebook_diversity_loss_weight, codebook_diversity_temperature: of minus the `spread` of
            `fastvq.parts.tables`, the entropy of the codes' mean soft assignment.
        stochastic_sample_codes: in training, draw each code as probable as its soft assignment says (`fastvq.sample`).
        sample_codebook_temp: temperature of that; 0 for the nearest code.
        straight_through: where route_gradients_to_input is False, pass x the gradient of the soft assignment: Gumbel
            straight-through. Elsewhere the plain straight-through estimate stands in for it.
        rotation_trick: estimate the gradient by the rotation trick, else straight through; by default where dim > 1.
        directional_reparam, directional_reparam_variance: learn the codes by `fastvq.parts.directional_reparam` alone.
        sync_codebook: learn with the other ranks, should there be any when it learns; None for yes.
        sync_affine_param: take affine_param's statistics over them.
        ema_update: use the moving averages; by default wherever the codebook isn't learnable.
        vq_bridge: a module (1, K, D) -> (1, K, D) whose output the vectors are compared with; the codebook is then
            learnable.
        manual_ema_update: the averages move in training, but the codes follow by `update_ema` of the codebook alone.
        learnable_codebook: the codebook is a parameter and the loss pulls it to the vectors by the same weight.
        in_place_codebook_optimizer: makes an optimizer of the codebook's parameters, which then take a step of their
            own before the output, see `fastvq.parts.in_place`.
        manual_in_place_optimizer_update: only gather its gradients; `update_in_place_optimizer` steps.
        affine_param, affine_param_batch_decay, affine_param_codebook_decay: compare with an affine image of the codes
            that follows the mean and variance of the vectors.
        sync_update_v: share of the output's gradient that the codes get, see `fastvq.parts.synchronous`.
        return_zeros_for_masked_padding: masked vectors come back as zero; if False, as they were.
        route_gradients_to_input: if False the output's gradient stops at the codes, which take it if learnable.
        revival: what to do with dead codes, instead of threshold_ema_dead_code (`fastvq.codebook.Revival`).

    Raises:
        ValueError: an argument, or a pair of arguments, that can't be; it is named.
        TypeError: an argument that doesn't exist.

    Numerics: search is exact (`fastvq.search`); codebook and statistics are float32 whatever dtype the module, x or
    autocast has.

    Source: van den Oord et al. 2017; the options' at the parts they name, and Dhariwal et al., Jukebox, 2020, for
    revival; Chang et al., Scalable Training for Vector-Quantized Networks with 100% Codebook Utilization (FVQ), 2025,
    for vq_bridge.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        revival: Revival | None = None,
    ) -> None:
        super().__init__()
        by_gradient = directional_reparam or vq_bridge is not None
        learnable_codebook = by_gradient if learnable_codebook is None else learnable_codebook
        ema_update = not (by_gradient or learnable_codebook) if ema_update is None else ema_update
        if rotation_trick is None:
            rotation_trick = dim > 1 and not (directional_reparam or straight_through)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        if revival is not None and threshold_ema_dead_code:
            raise ValueError("revival, threshold_ema_dead_code: only one of them may be given")
        check_vector_quantize(
            dim=dim,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            heads=heads,
            eps=eps,
            commitment_weight=commitment_weight,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code if revival is None else revival.threshold,
            orthogonal_reg_weight=orthogonal_reg_weight,
            orthogonal_reg_max_codes=orthogonal_reg_max_codes,
            codebook_diversity_loss_weight=codebook_diversity_loss_weight,
            codebook_diversity_temperature=codebook_diversity_temperature,
            directional_reparam_variance=directional_reparam_variance,
            decay=decay,
            sync_update_v=sync_update_v,
            learnable_codebook=learnable_codebook,
            ema_update=ema_update,
            use_cosine_sim=use_cosine_sim,
            straight_through=straight_through,
            rotation_trick=rotation_trick,
            directional_reparam=directional_reparam,
            vq_bridge=vq_bridge,
            affine_param=affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
            sample_codebook_temp=sample_codebook_temp,
            in_place_codebook_optimizer=in_place_codebook_optimizer,
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=accept_3d_fmap,
        )

        self.dim, self.codebook_size, self.codebook_dim = dim, codebook_size, codebook_dim
        self.heads, self.separate_codebook_per_head = heads, separate_codebook_per_head
        self._heads = Heads(heads, separate_codebook_per_head)
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.learnable_codebook = learnable_codebook

        self.commitment_weight = commitment_weight
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature

        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.straight_through = straight_through
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.sync_update_v = sync_update_v
        self.route_gradients_to_input = route_gradients_to_input
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        self.project_in, self.project_out = projections(dim, codebook_dim * heads, layernorm=layernorm_after_project_in)
        self.has_projections = codebook_dim * heads != dim
        affine = {
            "batch_decay": affine_param_batch_decay,
            "codebook_decay": affine_param_codebook_decay,
            "sync": sync_affine_param,
        }
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads=self._heads.codebooks,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync=sync_codebook,
            sync_kmeans=sync_kmeans,
            revival=Revival(threshold_ema_dead_code) if revival is None else revival,
            cosine=use_cosine_sim,
            learnable=learnable_codebook or orthogonal_reg_weight > 0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            affine=affine if affine_param else None,
            bridge=vq_bridge,
        )
        self._health = Health(codebook_size, heads if separate_codebook_per_head else None)
        self._history = History()
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self._in_place = (
            None
            if in_place_codebook_optimizer is None
            else InPlaceStep(in_place_codebook_optimizer, self._codebook.parameters())
        )

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

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D), or (H, K, D) for separate heads, float32; without the affine image or bridge that they are
        compared through. Assigning sets them, as unit vectors for cosine similarity, with moving averages that agree;
        k-means then has nothing to do."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        shape = self.codebook.shape
        if codes.shape != shape:
            like = "(H, K, D)" if self.separate_codebook_per_head else "(K, D)"
            raise ValueError(f"codebook: must have shape {like} = {tuple(shape)}, got {tuple(codes.shape)}")
        self._codebook.set_(codes if self.separate_codebook_per_head else codes[None])

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """(quantized, indices, loss) of x; with indices given, (quantized, their cross entropy).

        Args:
            x: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, N) if not channel_last; (B, dim, H, W) if
                accept_image_fmap; (B, dim, T, H, W) if accept_3d_fmap. Any floating dtype.
            indices: as this layer returns them, to be learned to predict: the loss is the cross entropy of the soft
                assignment of x to them, without those that are -1.
            mask: bool, shaped as the indices of one head, True for the vectors that count. The others cost nothing in
                the loss, touch no codebook and come back as index -1 and zero.
            lens: int (B,), the same for sequences: the first lens[b] vectors count.
            topk: give the so many nearest codes of each vector, and learn from none. For one head.
            sample_codebook_temp, freeze_codebook: for this call, instead of the layer's own.
            return_loss_breakdown: also return a `LossBreakdown`.
            codebook_transform_fn: makes codes (C, B, N, K, D) of the codes (C, K, D), for each vector its own.
            ema_update_weight: factor of this step's (1 - decay), (K,) or (H, K), or a function of (sums, counts).
            accum_ema_update: keep this batch's statistics for the next step of learning, which uses both.
            ema_update: for this call, instead of the layer's own.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, N), (B,), (B, ...), (B, H, W) or (B, T, H, W), with a
            last axis for heads if there are several; loss () float32. With topk, quantized and indices have an axis of
            that size behind those of the vectors, and loss is that of each code, shaped as the indices.

        Raises:
            ValueError, TypeError: what doesn't fit, by name.
        """
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        topk = self._checked_topk(topk)
        layout = self._layout(x)
        rows = layout.to_rows(x)
        rows_mask = layout.rows_mask(mask, lens)
        targets = None if indices is None else self._heads.split_indices(layout.indices_to_rows(indices))
        inputs = self.inputs(rows, rows_mask)
        learning = self.training and not frozen
        if learning:
            self._begin_pass(inputs)
        step = self.quantize_rows(
            inputs,
            self._heads.split_mask(rows_mask),
            shape=(layout.batch, layout.rows),
            learning=learning,
            topk=topk,
            targets=targets,
            temperature=sample_codebook_temp,
            transform=codebook_transform_fn,
        )
        if learning:
            self._note_pass(inputs)
        if learning and not (step.learned or topk):
            self._codebook.learn_(
                step.inputs.detach(),
                step.indices,
                weight=ema_update_weight,
                ema_update=ema_update,
                accumulate_only=accum_ema_update,
            )
        loss, breakdown = self.losses(step)
        if learning:
            self._end_pass()

        joined = self._heads.join_indices(step.indices, layout.batch, layout.rows)
        quantized = self._heads.join(step.quantized, layout.batch, layout.rows)
        quantized = self._projected_out(quantized, joined).to(x.dtype)
        if rows_mask is not None and not self.return_zeros_for_masked_padding:
            extra = [1] * (quantized.dim() - 2)
            original = rows if topk is None else rows.unsqueeze(2)
            quantized = torch.where(rows_mask.view(*rows_mask.shape, *extra), quantized, original)
        if step.cross_entropy is not None:
            return layout.from_rows(quantized), step.cross_entropy
        if topk is not None:
            loss, commitment = (
                layout.indices(self._heads.join_indices(each, layout.batch, layout.rows)) if each.dim() else each
                for each in (loss, breakdown.commitment)
            )
            breakdown = breakdown._replace(commitment=commitment)
        result = (layout.from_rows(quantized), layout.indices(joined), loss)
        return (*result, breakdown) if return_loss_breakdown else result

    def inputs(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rows (B, N, dim) as the codebooks see them, (C, R, D): projected, split, and of unit length for cosine
        similarity; NaN for what isn't finite, and outside of the mask (B, N)."""
        if not (self.has_projections or self.use_cosine_sim or self.heads > 1):
            return self._heads.split(rows)
        rows, counts = keep_finite(rows, mask)
        split = self._heads.split(self.project_in(rows))
        split = unit_norm(split.float()) if self.use_cosine_sim else split
        marks = self._heads.split_mask(counts)
        assert marks is not None
        return mark_bad(split, marks)

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
        zero = x.new_zeros((), dtype=error.dtype)
        diversity = zero
        if self.training and self.codebook_diversity_loss_weight > 0:
            diversity = -where.spread(x, shape, self.codebook_diversity_temperature, mask)
        if self.training and self.commitment_use_cross_entropy_loss and self.has_commitment_loss and topk is None:
            error = where.cross_entropy(x, chosen)
        entropy = (
            None
            if targets is None
            else where.cross_entropy(x, targets if mask is None else targets.masked_fill(~mask, -1))
        )
        in_place_loss = zero if in_place is None else in_place
        return Step(
            x, where, quantized, chosen, error, diversity, entropy, in_place_loss, learned=learned, learning=learning
        )

    def losses(self, step: Step) -> tuple[Tensor, LossBreakdown]:
        """The loss of a step, () or that of each code for top-k, and what it is made of; after the codebook's learning,
        since orthogonality is that of the codes to come."""
        commitment = orthogonal = zero = step.commitment.new_zeros(())
        loss = zero if step.commitment.dim() == 0 else torch.zeros_like(step.commitment)
        by_code = step.indices.dim() == 3  # top-k: told in eval too
        if self.has_commitment_loss and (self.training or by_code):
            commitment = step.commitment
            loss = commitment * self.commitment_weight
        elif by_code and not self.training:
            loss = commitment = step.commitment
        if self.training and self.codebook_diversity_loss_weight > 0:
            loss = loss + step.diversity * self.codebook_diversity_loss_weight
        if self.training and self.orthogonal_reg_weight > 0:
            used = None
            if self.orthogonal_reg_active_codes_only:
                used = used_codes(step.indices.flatten(1), self.codebook_size)
            # A copy, since the codes may move before the backward pass.
            codes = self._codebook.embed.clone() if step.learning else self._codebook.embed.detach()
            orthogonal = orthogonality(codes, used, most=self.orthogonal_reg_max_codes)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        return loss, LossBreakdown(commitment, step.diversity, orthogonal, step.in_place)

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Lets the codebook learn from x with these indices, as the forward pass does that found them.

        x, indices and mask are laid out as for `forward`; -1 is for vectors that don't count.
        """
        layout = self._layout(x)
        rows = layout.indices_to_rows(indices)
        split = self._heads.split_indices(rows)
        counted = self._heads.split_mask(layout.rows_mask(mask))
        if counted is not None:
            split = split.masked_fill(~counted, -1)
        inputs = self.inputs(layout.to_rows(x)).detach()
        self._codebook.learn_(inputs, split.masked_fill(~inputs.isfinite().all(-1), -1))

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """Puts dead codes on vectors of x (B, N, H D), which are as `project_in` gives them."""
        if self.training:
            inputs = self._heads.split(x.detach())
            inputs = unit_norm(inputs.float()) if self.use_cosine_sim else inputs
            self._codebook.revive_(inputs, inputs.isfinite().all(-1))

    def commit_ema_update(self) -> None:
        """One step of the moving averages with what `forward(..., accum_ema_update=True)` has kept, if it has."""
        self._codebook.commit_()

    def update_in_place_optimizer(self) -> None:
        """Steps the in-place optimizer with the gradients gathered, over all ranks."""
        if self._in_place is not None:
            self._in_place.step(self._codebook.together())

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices alone, shaped as `forward` returns them. Touches no state, in training neither."""
        layout = self._layout(x)
        inputs = self.inputs(layout.to_rows(x))
        indices = self._codebook(inputs, self._heads.split_mask(layout.rows_mask(mask)))
        return layout.indices(self._heads.join_indices(indices, layout.batch, layout.rows))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes (..., D) of indices (...), or (..., H D) of (..., H) for several heads, zeros for -1; channels
        first, (B, D, ...), where the layer is."""
        return codes_layout(self._decode(indices), self._channel_first)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives as quantized for these indices, in float32 or the projection's dtype."""
        return codes_layout(self._projected_out(self._decode(indices), indices), self._channel_first)

    def _decode(self, indices: Tensor) -> Tensor:
        heads = self._heads
        if heads.number > 1 and indices.shape[-1:] != (heads.number,):
            raise ValueError(f"indices: must have shape (..., H={heads.number}), got {tuple(indices.shape)}")
        flat = (indices.flatten(0, -2) if heads.number > 1 else indices.flatten())[None]
        codes = Shared(self._codebook.codes).lookup(heads.split_indices(flat))
        leading = indices.shape[:-1] if heads.number > 1 else indices.shape
        return heads.join(codes, 1, flat.shape[1]).view(*leading, heads.number * self.codebook_dim)

    def _projected_out(self, codes: Tensor, indices: Tensor) -> Tensor:
        if not self.has_projections:
            return codes
        absent = indices < 0
        return projected_out(self.project_out, codes, ~(absent.all(-1) if self.heads > 1 else absent))

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

    def _checked_topk(self, topk: int | None) -> int | None:
        if topk is None:
            return None
        if not topk >= 1:
            raise ValueError(f"topk: must be at least 1, got {topk}")
        if self.heads > 1:
            raise ValueError(f"topk: is for one head, not {self.heads}")
        if self.training and (self._in_place is not None or self.commitment_use_cross_entropy_loss):
            raise ValueError("topk: not beside an in-place optimizer or cross-entropy commitment in training")
        return min(int(topk), self.codebook_size)

    @property
    def _channel_first(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last

    def _layout(self, x: Tensor) -> Layout:
        spatial: tuple[int, ...] | None = None if self.channel_last else (0, 1)
        spatial = (2,) if self.accept_image_fmap else (3,) if self.accept_3d_fmap else spatial
        return Layout.of(x, self.dim, channel_first=self._channel_first, spatial=spatial)
