"""The single-codebook vector quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvq.codebook import Codebook, Replacement, learn_together
from fastvq.codebook.fit import Fitted, fit_, passes, refuse_frozen
from fastvq.codebook.health import Health, Monitored
from fastvq.codebook.in_place import InPlaceStep
from fastvq.codebook.recompute import History
from fastvq.codebook.state import checked_decay
from fastvq.codebook.storage import refuse_sharded
from fastvq.distributed import may_be_recomputed, recomputing, tie_parameters
from fastvq.functional.quantize import check_some_code, lookup, quantize, unit_norm, weighted
from fastvq.ops import search
from fastvq.parts.arguments import check_callables, check_fractions, check_not_negative, check_positive, check_sizes
from fastvq.parts.bridge import VQBridge
from fastvq.parts.gradients import Estimator
from fastvq.parts.indices import checked_indices
from fastvq.parts.losses import orthogonality, used_codes
from fastvq.parts.masking import exclude_non_finite, nan_fill
from fastvq.parts.projection import Projected, project_codes_out, projected_rows, projections
from fastvq.parts.shapes import Heads, Layout, codes_in_layout, layout_of
from fastvq.parts.tables import PerRow, Shared, Table
from fastvq.precision import full_precision


class VectorQuantizeLosses(NamedTuple):
    """The losses of a `VectorQuantize` before their weights; zero where a loss is unused."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class QuantizedRows(NamedTuple):
    """The result of `VectorQuantize.quantize_rows`, with C codebooks and R rows for each of them."""

    inputs: Tensor  # (C, R, D), as they are compared with the codes
    quantized: Tensor  # (C, R, D), or (C, R, k, D) for top-k
    indices: Tensor  # (C, R), or (C, R, k) for top-k
    commitment: Tensor  # (), or (C, R, k) for top-k
    diversity: Tensor | None  # ()
    cross_entropy: Tensor | None  # (), with targets
    in_place: Tensor | None  # (), with an in-place optimizer
    learned: bool  # whether the codebook has learned from these rows already
    codebook_error: Tensor | None = None  # as commitment, with a weight of its own for the codebook loss


class VectorQuantize(Projected, Monitored, nn.Module):
    """Vector quantizer that replaces each vector by its nearest code, with the API of vector_quantize_pytorch.

        quantized = project_out(e_index),   index = argmin_k |project_in(x) - e_k|^2
        loss = commitment_weight * mean (project_in(x) - sg[e_index])^2 + the other losses     (zero in eval)

    In training the codebook follows the exponential moving averages of its vectors (`fastvq.ema_update_`), or learns by
    gradient if it is learnable; the output uses the codes from before the update. Vectors with NaN or infinity get
    index -1 and a zero output, and contribute neither to the loss nor to the codebook.

    Args:
        dim: dimension of the input and output vectors.
        codebook_size: K.
        codebook_dim: D, the dimension of the codes. If heads * D is not dim, linear projections surround the codebook.
        heads: number of parts of a vector that are quantized separately, see `fastvq.parts.shapes.Heads`.
        separate_codebook_per_head: each head has its own codebook.
        decay: decay of the moving averages, in [0, 1].
        eps: Laplace smoothing of the cluster sizes.
        freeze_codebook: keep the codebook bit-identical, in training too.
        kmeans_init: initialize the codebook by k-means on the first training batch; until then it is zero.
        kmeans_iters: number of k-means iterations.
        sync_kmeans: run k-means over all ranks.
        use_cosine_sim: compare directions: x and the codes are normalized, and the largest product wins. A learnable
            codebook is a parameter of any length, and its codes are normalized when they are used.
        layernorm_after_project_in: apply a layer norm after the input projection.
        threshold_ema_dead_code: replace codes whose moving cluster size is below this by random vectors of the batch; 0
            for never.
        channel_last: vectors are (B, N, dim); if False, (B, dim, N).
        accept_image_fmap, accept_3d_fmap: x is (B, dim, H, W), or (B, dim, T, H, W).
        commitment_weight: beta; 0 for no commitment loss.
        commitment_use_cross_entropy_loss: use the cross entropy between the soft assignment and the chosen code as
            commitment loss (`fastvq.cross_entropy`).
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: weight of
            `fastvq.parts.losses.orthogonality`; whether it only covers the codes used by the batch; the largest number
            of codes, drawn at random, that it covers.
        codebook_diversity_loss_weight, codebook_diversity_temperature: weight and temperature of the diversity loss,
            minus the `positional_entropy` of `fastvq.parts.tables`.
        stochastic_sample_codes: in training, sample each code from the soft assignment (`fastvq.sample`).
        sample_codebook_temp: temperature of the sampling; 0 for the nearest code.
        straight_through: use the straight-through estimator instead of the rotation trick; beside
            route_gradients_to_input=False, pass x the gradient of the soft assignment (Gumbel straight-through).
        rotation_trick: use the rotation trick instead of the straight-through estimator; by default if dim > 1.
        directional_reparam, directional_reparam_variance: learn the codes only by `fastvq.parts.directional_reparam`.
        sync_codebook: learn with all ranks if a process group exists when the codebook learns; None means True.
        sync_affine_param: take the statistics of affine_param over all ranks.
        ema_update: use the moving averages; by default unless the codebook is learnable.
        vq_bridge: a module (1, K, D) -> (1, K, D) whose output the vectors are compared with; requires a learnable
            codebook.
        manual_ema_update: move the averages in training, but the codes only by `update_ema` of the codebook.
        learnable_codebook: make the codebook a parameter that the loss pulls to the vectors, with the commitment weight
            unless codebook_weight is given.
        in_place_codebook_optimizer: a function that makes an optimizer of the codebook's parameters; it steps before
            the output is computed, see `fastvq.codebook.in_place`.
        manual_in_place_optimizer_update: only accumulate its gradients; `update_in_place_optimizer` steps.
        affine_param, affine_param_batch_decay, affine_param_codebook_decay: compare with an affine image of the codes
            that follows the mean and variance of the vectors, see `fastvq.codebook.affine`.
        sync_update_v: share of the output's gradient for the codes, see `fastvq.parts.synchronous`.
        return_zeros_for_masked_padding: return zeros for masked vectors; if False, return them unchanged.
        route_gradients_to_input: if False, the output's gradient reaches the codes, if learnable, instead of x.
        kmeans_seeding: the rows that k-means starts from: "k-means++", far from each other, or "random".
        replacement: policy for dead codes, instead of threshold_ema_dead_code (`fastvq.Replacement`).
        codebook_weight: weight of a codebook loss of its own, for learnable codes:
            loss = commitment_weight mean (x - sg[e])^2 + codebook_weight mean (sg[x] - e)^2 + the other losses. 1, with
            commitment_weight = beta, are the losses of VQ-VAE.

    Raises:
        ValueError: an argument or a combination of arguments is invalid; the message names them.
        TypeError: an unknown argument.

    Numerics: the search is exact (`fastvq.search`). The codebook and its statistics are float32 whatever the dtype of
    the module, x or autocast.

    Source: van den Oord et al. 2017; for options, see the parts that they name; Dhariwal et al., Jukebox, 2020, for the
    replacement of dead codes; Chang et al., Scalable Training for Vector-Quantized Networks with 100% Codebook
    Utilization (FVQ), 2025, for vq_bridge.
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
        replacement: Replacement | None = None,
        kmeans_seeding: str = "k-means++",
        codebook_weight: float | None = None,
    ) -> None:
        super().__init__()
        by_gradient = directional_reparam or vq_bridge is not None
        learnable = by_gradient if learnable_codebook is None else learnable_codebook
        ema_update = not (by_gradient or learnable) if ema_update is None else ema_update
        if rotation_trick is None:
            rotation_trick = dim > 1 and not (directional_reparam or straight_through)
        codebook_dim = dim if codebook_dim is None else codebook_dim

        check_sizes(dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim, heads=heads)
        check_not_negative(
            commitment_weight=commitment_weight,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sample_codebook_temp=sample_codebook_temp,
            orthogonal_reg_weight=orthogonal_reg_weight,
            codebook_diversity_loss_weight=codebook_diversity_loss_weight,
            directional_reparam_variance=directional_reparam_variance,
        )
        check_fractions(
            sync_update_v=sync_update_v,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
        )
        check_positive(codebook_diversity_temperature=codebook_diversity_temperature)
        if orthogonal_reg_max_codes is not None:
            check_sizes(orthogonal_reg_max_codes=orthogonal_reg_max_codes)
        check_callables(vq_bridge=vq_bridge, in_place_codebook_optimizer=in_place_codebook_optimizer)
        if not isinstance(replacement, Replacement | None):
            raise ValueError(f"replacement: must be a fastvq.Replacement, got {replacement!r}")
        if isinstance(vq_bridge, VQBridge) and (vq_bridge.codebook_size, vq_bridge.dim) != (
            codebook_size,
            codebook_dim,
        ):
            raise ValueError(
                f"vq_bridge: must be for codebook_size={codebook_size} and dim={codebook_dim}, got one for"
                f" {vq_bridge.codebook_size} and {vq_bridge.dim}"
            )
        if replacement is not None and threshold_ema_dead_code:
            raise ValueError("replacement, threshold_ema_dead_code: only one of them may be given")
        replacement = Replacement(threshold_ema_dead_code) if replacement is None else replacement
        if learnable and ema_update:
            raise ValueError("ema_update: must be False beside learnable_codebook=True: one of them moves the codebook")
        if use_cosine_sim and affine_param:
            raise ValueError("affine_param: must be False beside use_cosine_sim=True")
        if codebook_weight is not None:
            check_not_negative(codebook_weight=codebook_weight)
            for name, given in (
                ("learnable_codebook must be True", not learnable),
                ("directional_reparam must be False", directional_reparam),
                ("in_place_codebook_optimizer must be None", in_place_codebook_optimizer is not None),
                ("commitment_use_cross_entropy_loss must be False", commitment_use_cross_entropy_loss),
            ):
                if given:
                    raise ValueError(f"codebook_weight: {name} beside it, got {codebook_weight}")
        estimators = {
            "straight_through": straight_through,
            "rotation_trick": rotation_trick,
            "directional_reparam": directional_reparam,
        }
        if sum(map(bool, estimators.values())) > 1:
            names = ", ".join(name for name, given in estimators.items() if given)
            raise ValueError(f"{names}: only one of them may be True")
        if straight_through and learnable:
            raise ValueError("straight_through: must be False beside learnable_codebook=True")
        if directional_reparam and not replacement.threshold:
            raise ValueError("threshold_ema_dead_code: must be positive beside directional_reparam=True")
        for name, given in (
            ("vq_bridge", vq_bridge is not None),
            ("in_place_codebook_optimizer", in_place_codebook_optimizer is not None),
            ("sync_update_v", sync_update_v > 0),
        ):
            if given and not learnable:
                raise ValueError(f"learnable_codebook: must be True beside {name}")
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap, accept_3d_fmap: only one of them may be True")

        self.dim, self.codebook_size, self.codebook_dim = dim, codebook_size, codebook_dim
        self.heads, self.separate_codebook_per_head = heads, separate_codebook_per_head
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.learnable_codebook = learnable
        self.channel_last = channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
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
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update

        self._heads = Heads(heads, separate_codebook_per_head)
        self.project_in, self.project_out = projections(dim, codebook_dim * heads, layernorm=layernorm_after_project_in)
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
            kmeans_seeding=kmeans_seeding,
            sync=sync_codebook,
            sync_kmeans=sync_kmeans,
            replacement=replacement,
            cosine=use_cosine_sim,
            learnable=learnable or orthogonal_reg_weight > 0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            affine=affine if affine_param else None,
            bridge=vq_bridge,
        )
        self._health = Health(codebook_size, heads if separate_codebook_per_head else None)
        self._history = History()
        optimizer = in_place_codebook_optimizer
        self._in_place = None if optimizer is None else InPlaceStep(optimizer, self._codebook.parameters())

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D), or (H, K, D) for separate heads, float32, before any affine map or bridge.

        Assigning sets them, normalized for cosine similarity, with moving averages that agree; k-means then won't run.
        """
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        shape = self.codebook.shape
        if codes.shape != shape:
            like = "(H, K, D)" if self.separate_codebook_per_head else "(K, D)"
            raise ValueError(f"codebook: must have shape {like} = {tuple(shape)}, got {tuple(codes.shape)}")
        self._codebook.set_(codes if self.separate_codebook_per_head else codes[None])

    @property
    def decay(self) -> float | Tensor:
        """The decay of the moving averages, which a schedule may assign at each step: a number, or a tensor ()."""
        return self._codebook.decay

    @decay.setter
    def decay(self, decay: float | Tensor) -> None:
        self._codebook.decay = checked_decay(decay)

    @property
    def _synchronizes(self) -> bool:
        return self._codebook.sync is not False

    def _non_finite(self) -> Tensor:
        return self._codebook.non_finite()

    @property
    def ema_update(self) -> bool:
        """True if the codebook follows moving averages."""
        return self._codebook.ema_update

    @property
    def in_place_codebook_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that the argument of this name has made."""
        return None if self._in_place is None else self._in_place.optimizer

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            indices: None = None,
            mask: Tensor | None = None,
            lens: Tensor | None = None,
            topk: int | None = None,
            sample_codebook_temp: float | None = None,
            freeze_codebook: bool | None = None,
            return_loss_breakdown: Literal[False] = False,
            codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
            ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
            accum_ema_update: bool = False,
            ema_update: bool | None = None,
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_loss_breakdown: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor, VectorQuantizeLosses]: ...
        @overload
        def __call__(self, x: Tensor, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

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
        """Return (quantized, indices, loss) of x, or with indices given, (quantized, their cross entropy).

        Args:
            x: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, N) if not channel_last; (B, dim, H, W) if
                accept_image_fmap; (B, dim, T, H, W) if accept_3d_fmap. Any floating dtype.
            indices: targets, shaped as this layer returns them: the loss is the cross entropy between the soft
                assignment of x and the targets that aren't -1.
            mask: bool, shaped as the indices of one head, True for the vectors that take part. The others contribute
                neither to the loss nor to the codebook, and have index -1 and a zero output.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.
            topk: return the k nearest codes of each vector, and don't learn. For one head.
            sample_codebook_temp, freeze_codebook: override the layer's own for this call.
            return_loss_breakdown: also return `VectorQuantizeLosses`.
            codebook_transform_fn: a function from codes (C, K, D) to codes (C, B, N, K, D), which differ by vector.
            ema_update_weight: factor of this step's (1 - decay), (K,) or (H, K), or a function of (sums, counts).
            accum_ema_update: keep this batch's statistics for the next learning step, which uses both.
            ema_update: overrides the layer's own for this call.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, N), (B,), (B, ...), (B, H, W) or (B, T, H, W), with a
            last axis for heads if there are several; loss () float32. With topk, quantized and indices have an axis of
            size k after the axes of the vectors, and loss is that of each code, shaped as the indices.

        Raises:
            ValueError, TypeError: an argument is invalid; the message names it.
        """
        learning = self.training and not (self.freeze_codebook if freeze_codebook is None else freeze_codebook)
        repeatable = learning and may_be_recomputed()
        no_options = indices is mask is lens is topk is codebook_transform_fn is ema_update_weight is ema_update is None
        no_options = no_options and not (return_loss_breakdown or accum_ema_update)
        if no_options and not repeatable and self._is_plain(learning):
            return self._forward_plain(x, learning)

        topk = self._checked_topk(topk)
        layout = self._layout(x)
        rows = layout.to_rows(x)
        rows_mask = layout.rows_mask(mask, lens)
        targets = None if indices is None else self._heads.split_indices(layout.indices_to_rows(indices))
        inputs = self.split_rows(rows, rows_mask)
        if repeatable:
            self._history.replay(inputs, [self._codebook])
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
        if repeatable:
            self._history.record(inputs, [self._codebook])
        if learning and not (step.learned or topk):
            self._codebook.learn_(
                inputs.detach(),
                step.indices,
                weight=ema_update_weight,
                ema_update=ema_update,
                accumulate_only=accum_ema_update,
            )
        loss, breakdown = self.losses(step, learning)
        if repeatable:
            self._history.finish([self._codebook])

        joined = self._heads.join_indices(step.indices, layout.batch, layout.rows)
        quantized = self._heads.join(step.quantized, layout.batch, layout.rows)
        quantized = self._project_out(quantized, joined).to(x.dtype)
        if rows_mask is not None and not self.return_zeros_for_masked_padding:
            extra = [1] * (quantized.dim() - 2)
            original = rows if topk is None else rows.unsqueeze(2)
            quantized = torch.where(rows_mask.view(*rows_mask.shape, *extra), quantized, original)
        if step.cross_entropy is not None:
            return tie_parameters(self, (layout.from_rows(quantized), step.cross_entropy))
        if topk is not None:
            loss, commitment = (
                layout.indices(self._heads.join_indices(each, layout.batch, layout.rows)) if each.dim() else each
                for each in (loss, breakdown.commitment)
            )
            breakdown = breakdown._replace(commitment=commitment)
        result = tie_parameters(self, (layout.from_rows(quantized), layout.indices(joined), loss))
        # A loss of its own: what is added to it in place stays out of the breakdown.
        return (*result[:2], loss.clone(), breakdown) if return_loss_breakdown else result

    def _is_plain(self, learning: bool) -> bool:
        """Return whether `_forward_plain` can replace the general forward pass, by the settings and state of now."""
        codebook, modules = self._codebook, self._modules
        # has_projections, without a call
        identities = type(modules["project_in"]) is type(modules["project_out"]) is nn.Identity
        if self.heads > 1 or not identities or self.use_cosine_sim or codebook.vq_bridge is not None:
            return False
        if not self.training:
            return True
        if "embed" not in codebook._buffers and DistributedDataParallel._active_ddp_module is not None:
            return False  # a parameter that takes no part, because it is frozen
        return (not learning or codebook.ready()) and not self.straight_through and self.only_searches(learning)

    def _forward_plain(self, x: Tensor, learning: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run the common case of `forward`, with the same results: layout, search, quantize, learn, loss."""
        layout = self._layout(x)
        rows = layout.to_rows(x).reshape(-1, self.dim)
        codes = self._codebook.codes[0].detach()
        indices = search(rows.detach(), codes)
        quantized, _, error = quantize(
            rows if self.training else rows.detach(),
            codes,
            gradient="rotation" if self.rotation_trick else "ste",
            indices=indices,
        )
        if self.training or self._measures:
            self._health.observe_(indices, error)
        if learning:
            learn_together([self._codebook], [rows.detach()[None]], [indices[None]])
        loss = weighted(error, self.commitment_weight if self.training else 0)
        shape = (layout.batch, layout.rows)
        return layout.from_rows(quantized.view(*shape, self.dim)), layout.indices(indices.view(shape)), loss

    def only_searches(self, learning: bool) -> bool:
        """Return whether a forward pass consists of the search of fixed codes, the lookup, and a gradient for x."""
        if not self.training:
            return True
        passes_on = self.route_gradients_to_input and not self.directional_reparam
        soft = self.stochastic_sample_codes or self._is_soft or self.orthogonal_reg_weight > 0
        moves = learning and (self.learnable_codebook or self._codebook.affine is not None)
        return passes_on and not (soft or moves)

    @property
    def has_commitment_loss(self) -> bool:
        """True if training uses a commitment loss, by the attributes as of now."""
        return _positive(self.commitment_weight) and not self.directional_reparam

    @property
    def _is_soft(self) -> bool:
        """True if training uses a loss of the soft assignment."""
        entropy = self.commitment_use_cross_entropy_loss and self.has_commitment_loss
        return entropy or self.codebook_diversity_loss_weight > 0

    def split_rows(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return rows (B, N, dim) as the codebooks are compared with them, (C, R, D).

        They are projected, split into heads and, for cosine similarity, normalized. Rows that are not finite or outside
        the mask (B, N) become NaN if anything of this is done.
        """
        if not (self.has_projections or self.use_cosine_sim or self.heads > 1):
            return self._heads.split(rows)
        rows, mask = exclude_non_finite(rows, mask)
        split = self._heads.split(projected_rows(self.project_in, rows))
        split = unit_norm(split.float()) if self.use_cosine_sim else split
        split_mask = self._heads.split_mask(mask)
        assert split_mask is not None
        return nan_fill(split, split_mask)

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
    ) -> QuantizedRows:
        """Quantize rows with any combination of options, without the projections and without learning by averages.

        Args:
            x: (C, R, D) from `split_rows`.
            mask: bool (C, R), or None.
            shape: (B, N) of the vectors that the rows are parts of.
            learning: whether the codebook may change: by k-means, affine statistics or its in-place optimizer.
            topk: number of codes for each row.
            indices: (C, R), if they have been found already.
            targets: (C, R), of the cross entropy.
            temperature: overrides sample_codebook_temp.
            table: makes the table of the codes (C, K, D).
            transform: the argument codebook_transform_fn of `forward`.
        """
        codebook = self._codebook
        if learning:
            codebook.initialize_(x.detach(), mask)
        learned = self.learnable_codebook and learning
        temperature = self.sample_codebook_temp if temperature is None else temperature

        def current_table() -> Table:
            if codebook.vq_bridge is None:
                codes = codebook.codes
            else:
                with full_precision(x):
                    codes = codebook.codes
            if not (learning and codes.requires_grad):
                codes = codes.detach()
            elif self._is_soft or targets is not None:
                codes = codes.clone()  # the backward pass needs them as they are now
            if transform is not None:
                return PerRow(transform(codes).reshape(*x.shape[:2], *codes.shape[1:]), codebook.metric)
            return Shared(codes, codebook.metric) if table is None else table(codes)

        given = indices
        current = current_table()
        indices = self.choose(current, x, mask, topk, temperature) if given is None else given
        estimator = self._estimator(temperature)
        in_place = None
        if self._in_place is not None and learning and not recomputing():
            # The codes step on this batch first; the output then uses the new codes, as in vector_quantize_pytorch.
            before = indices
            codebook.learn_(x.detach(), before)
            refuse_sharded(codebook, "in_place_codebook_optimizer")
            self._in_place.follow(codebook.parameters())
            in_place = self._in_place.backward(
                lambda: estimator.output(x.detach(), current_table(), before, learned=True).error
            )
            if not self.manual_in_place_optimizer_update:
                self.update_in_place_optimizer()
            current = current_table()
            indices = self.choose(current, x, mask, topk, temperature) if given is None else given
        # As in vector_quantize_pytorch, no gradient flows in eval.
        found = estimator.output(x if self.training else x.detach(), current, indices, learned=learned)
        quantized, error = found.quantized, found.error
        if (self.training or self._measures) and topk is None:
            self._health.observe_(indices if self.separate_codebook_per_head else indices.flatten(), error)
        diversity = cross_entropy = None
        if self.training and self.codebook_diversity_loss_weight > 0:
            diversity = -current.positional_entropy(x, shape, self.codebook_diversity_temperature, mask)
        if self.training and self.commitment_use_cross_entropy_loss and self.has_commitment_loss and topk is None:
            error = current.cross_entropy(x, indices)
        if targets is not None:
            cross_entropy = current.cross_entropy(x, targets if mask is None else targets.masked_fill(~mask, -1))
        return QuantizedRows(
            x, quantized, indices, error, diversity, cross_entropy, in_place, in_place is not None, found.codebook_error
        )

    def choose(self, table: Table, x: Tensor, mask: Tensor | None, topk: int | None, temperature: float) -> Tensor:
        """Return the indices (C, R), or (C, R, k) for top-k, of x (C, R, D): of the nearest codes, or sampled ones."""
        x = x.detach()
        if self.training and self.stochastic_sample_codes and _positive(temperature):
            return table.draw(x, temperature, topk, mask)
        return table.nearest(x, mask) if topk is None else table.nearest_k(x, topk, mask)

    def _estimator(self, temperature: float) -> Estimator:
        kind = "rotation" if self.rotation_trick else "directional" if self.directional_reparam else "ste"
        soft = temperature if self.straight_through and self.training and _positive(temperature) else None
        return Estimator(
            kind,
            self.directional_reparam_variance,
            self.sync_update_v,
            self.route_gradients_to_input,
            soft,
            separate=self.codebook_weight is not None,
        )

    def losses(self, step: QuantizedRows, learning: bool) -> tuple[Tensor, VectorQuantizeLosses]:
        """Return the loss, (), or that of each code for top-k, and its parts.

        Called after the codebook has learned, because the orthogonality loss is that of the new codes.
        """
        commitment = orthogonal = zero = step.commitment.new_zeros(())
        loss = zero if step.commitment.dim() == 0 else torch.zeros_like(step.commitment)
        by_code = step.indices.dim() == 3  # top-k, which returns the loss in eval too
        if self.has_commitment_loss and (self.training or by_code):
            commitment = step.commitment
            loss = weighted(commitment, self.commitment_weight)
        elif by_code and not self.training:
            loss = commitment = step.commitment
        if step.codebook_error is not None and self.codebook_weight is not None:
            loss = loss + weighted(step.codebook_error, self.codebook_weight)
        if step.diversity is not None:
            loss = loss + step.diversity * self.codebook_diversity_loss_weight
        if self.training and self.orthogonal_reg_weight > 0:
            used = None
            if self.orthogonal_reg_active_codes_only:
                used = used_codes(step.indices.flatten(1), self.codebook_size)
            # A copy, because the codes may move before the backward pass.
            codes = self._codebook.embed.clone() if learning else self._codebook.embed.detach()
            orthogonal = orthogonality(codes, used, most=self.orthogonal_reg_max_codes)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        diversity, in_place = (zero if each is None else each for each in (step.diversity, step.in_place))
        return loss, VectorQuantizeLosses(commitment, diversity, orthogonal, in_place)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, lens: Tensor | None = None) -> Tensor:
        """Return the indices alone, shaped as `forward` returns them. No state changes, not even in training.

        Raises:
            CodebookError: no code is finite, so that no vector has an index.
        """
        layout = self._layout(x)
        inputs = self.split_rows(layout.to_rows(x))
        indices = self._codebook(inputs, self._heads.split_mask(layout.rows_mask(mask, lens)))
        for chosen, codes in zip(indices, self._codebook.codes, strict=True):
            check_some_code("codebook", chosen, codes)
        return layout.indices(self._heads.join_indices(indices, layout.batch, layout.rows))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (..., D) of indices (...), or (..., H D) of (..., H) for several heads, zeros for -1.

        Channels come first, (B, D, ...), if the layer's input has them first.
        """
        return codes_in_layout(self._decode(checked_indices(indices, self.codebook_size)), self._channel_first)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return the quantized output of `forward` for these indices, in float32 or the projection's dtype."""
        indices = checked_indices(indices, self.codebook_size)
        return codes_in_layout(self._project_out(self._decode(indices), indices), self._channel_first)

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Let the codebook learn from x with these indices, as the forward pass does that found them.

        x, indices and mask are laid out as for `forward`; vectors with index -1 are excluded.
        """
        layout = self._layout(x)
        rows = layout.indices_to_rows(indices)
        split = self._heads.split_indices(rows)
        split_mask = self._heads.split_mask(layout.rows_mask(mask))
        if split_mask is not None:
            split = split.masked_fill(~split_mask, -1)
        inputs = self.split_rows(layout.to_rows(x)).detach()
        self._codebook.learn_(inputs, split.masked_fill(~inputs.isfinite().all(-1), -1))

    # This name, and that of `expire_codes_`, are those of vector_quantize_pytorch.
    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """Replace dead codes by vectors of x (B, N, H D), which are outputs of `project_in`."""
        if self.training:
            inputs = self._heads.split(x.detach())
            inputs = unit_norm(inputs.float()) if self.use_cosine_sim else inputs
            self._codebook.replace_dead_(inputs, inputs.isfinite().all(-1))

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Return the codebook to the state of a new layer: random codes, or with kmeans_init those of the next batch.

        Its averages, the state of its in-place optimizer and the health are reset too; projections and a bridge stay.
        The state that other optimizers keep of a learnable codebook is theirs to reset. With several ranks all of them
        must call this, which gives them the same codes.
        """
        self._codebook.reinitialize_()
        self._history.clear()
        if self._in_place is not None:
            self._in_place.optimizer.state.clear()
        self.reset_health()

    @torch.no_grad()
    def fit(
        self, batches: Iterable[Any], *, inputs: Callable[[Any], Tensor] | None = None, iterations: int = 10
    ) -> Fitted:
        """Fit the codebook to a data set by k-means over all of its batches, instead of kmeans_init's first one.

        The data set is read iterations + 1 times; nothing but the codebook and a sample of 32 K vectors is kept. The
        cluster sizes become the mean counts of a batch. With several ranks all of them must call this, each with its
        own share of the data, unless sync_codebook=False.

        Args:
            batches: a DataLoader, a list, or another iterable that starts anew at each pass.
            inputs: maps a batch to x, laid out as for `forward`; by default the batches are x themselves. It may hold
                the encoder.
            iterations: number of rounds of k-means.

        Returns:
            errors (iterations,), the mean squared error per element in each round; and the number of vectors.

        Raises:
            ValueError: the codes are frozen, or computed from others (affine_param, vq_bridge), or no vector is finite.
            TypeError: batches can be iterated only once, or a batch is no tensor.
        """
        check_sizes(iterations=iterations)
        refuse_frozen([self])
        for name in ("affine_param", "vq_bridge"):
            if getattr(self._codebook, name.removesuffix("_param")) is not None:
                raise ValueError(f"{name}: its codes are computed from others, which k-means can't set")
        start = passes(batches, inputs)

        def rows(_: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
            for x in start():
                yield self.split_rows(self._layout(x).to_rows(x).to(self._codebook.embed_avg.device)), None

        fitted = fit_(self._codebook, rows, iterations=iterations)
        self._history.clear()
        self.reset_health()
        return fitted

    def resize_(self, codebook_size: int) -> None:
        """Change the number of codes in place, and keep the averages of those that stay.

        With fewer codes those of the largest cluster sizes stay, in their order; with more, those are split into nearby
        codes that share the cluster size, after the others, so that old indices keep their meaning. The health is
        reset. A learnable codebook is a new parameter, which optimizers have to be given. With several ranks all of
        them must call this.

        Raises:
            ValueError: codebook_size is less than 1; the layer has a vq_bridge or an in_place_codebook_optimizer.
        """
        check_sizes(codebook_size=codebook_size)
        if self._in_place is not None:
            raise ValueError("in_place_codebook_optimizer: must be None to change the number of codes")
        self._codebook.resize_(codebook_size)
        self.codebook_size = codebook_size
        self._health = Health(codebook_size, self.heads if self.separate_codebook_per_head else None)
        self._history.clear()

    def commit_ema_update(self) -> None:
        """Learn from the statistics that `forward(..., accum_ema_update=True)` has kept, if there are any."""
        self._codebook.commit_()

    def update_in_place_optimizer(self) -> None:
        """Step the in-place optimizer with the accumulated gradients, over all ranks."""
        if self._in_place is not None:
            self._in_place.step(self._codebook.together())

    def _decode(self, indices: Tensor) -> Tensor:
        heads = self._heads
        if heads.number == 1:
            return lookup(self._codebook.codes[0], indices)
        if indices.shape[-1:] != (heads.number,):
            raise ValueError(f"indices: must have shape (..., H={heads.number}), got {tuple(indices.shape)}")
        flat = indices.flatten(0, -2)[None]
        codes = Shared(self._codebook.codes).lookup(heads.split_indices(flat))
        return heads.join(codes, 1, flat.shape[1]).view(*indices.shape[:-1], heads.number * self.codebook_dim)

    def _project_out(self, codes: Tensor, indices: Tensor) -> Tensor:
        if not self.has_projections:
            return codes
        absent = indices < 0
        return project_codes_out(self.project_out, codes, ~(absent.all(-1) if self.heads > 1 else absent))

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
        return layout_of(
            x,
            self.dim,
            channel_last=self.channel_last,
            image=self.accept_image_fmap,
            video=self.accept_3d_fmap,
        )


def _positive(value: float | Tensor) -> bool:
    """Return whether a temperature or weight is positive: a tensor counts as such, as reading it would wait."""
    return isinstance(value, Tensor) or value > 0
