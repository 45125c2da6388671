"""The single-codebook vector quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.codebook import Codebook, Revival
from fastvq.codebook.health import Health
from fastvq.codebook.in_place import InPlaceStep
from fastvq.codebook.recompute import History
from fastvq.functional.quantize import unit_norm
from fastvq.parts.indices import checked_indices
from fastvq.parts.projection import projections
from fastvq.parts.shapes import Heads, Layout, codes_in_layout

from .row_quantizer import RowQuantizer
from .settings import check_vector_quantize


class VectorQuantize(RowQuantizer):
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
        heads: parts of a vector that are coded by themselves, see `fastvq.parts.shapes`.
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
        codebook_diversity_loss_weight, codebook_diversity_temperature: of minus the `positional_entropy` of
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
            own before the output, see `fastvq.codebook.in_place`.
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
        self.dim, self.codebook_size, self.codebook_dim = dim, codebook_size, codebook_dim
        self.heads, self.separate_codebook_per_head = heads, separate_codebook_per_head
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
        check_vector_quantize(
            **vars(self),
            threshold_ema_dead_code=threshold_ema_dead_code if revival is None else revival.threshold,
            ema_update=ema_update,
            vq_bridge=vq_bridge,
            affine_param=affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
            in_place_codebook_optimizer=in_place_codebook_optimizer,
        )

        self._heads = Heads(heads, separate_codebook_per_head)
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
        # A loss of its own: what is added to it in place stays out of the breakdown.
        return (*result[:2], loss.clone(), breakdown) if return_loss_breakdown else result

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

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices alone, shaped as `forward` returns them. Touches no state, in training neither."""
        layout = self._layout(x)
        inputs = self.inputs(layout.to_rows(x))
        indices = self._codebook(inputs, self._heads.split_mask(layout.rows_mask(mask)))
        return layout.indices(self._heads.join_indices(indices, layout.batch, layout.rows))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes (..., D) of indices (...), or (..., H D) of (..., H) for several heads, zeros for -1; channels
        first, (B, D, ...), where the layer is."""
        return codes_in_layout(self._decode(checked_indices(indices, self.codebook_size)), self._channel_first)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives as quantized for these indices, in float32 or the projection's dtype."""
        indices = checked_indices(indices, self.codebook_size)
        return codes_in_layout(self._projected_out(self._decode(indices), indices), self._channel_first)

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
