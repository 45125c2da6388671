"""Residual vector quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvq.codebook import Codebook, learn_together
from fastvq.codebook.fit import Fitted, Passes, passes, refuse_frozen
from fastvq.codebook.health import observe_stages_
from fastvq.codebook.recompute import History
from fastvq.distributed import may_be_recomputed, tie_parameters
from fastvq.functional.quantize import check_some_code, lookup, weighted
from fastvq.functional.residual_quantize import residual_quantize
from fastvq.ops import residual_quantize_forward, residual_search
from fastvq.parts.arguments import check_fractions, check_sizes, in_the_name_of
from fastvq.parts.beam import Stage, beam_search
from fastvq.parts.dropout import ActiveStages
from fastvq.parts.gradients import directional_reparam, rotate_to, scale_gradient, straight_through
from fastvq.parts.losses import mean_squared_errors
from fastvq.parts.masking import exclude_non_finite, nan_fill
from fastvq.parts.projection import (
    Projected,
    parameter_dtype,
    project_codes_out,
    projected_rows,
    projections,
)
from fastvq.parts.shapes import Layout, codes_in_layout, layout_of
from fastvq.parts.tables import Implicit, NeuralCodes, Shared, Table
from fastvq.precision import at_least_float32

from .residual import ResidualStack, SharedSetting
from .vector_quantize import QuantizedRows, VectorQuantize

GRADIENTS_OF_STACKS = ("stages", "once")


class ResidualVQ(Projected, ResidualStack):
    """Residual vector quantizer with one code for each stage, with the API of vector_quantize_pytorch.

        r_0 = project_in(x),   index_q = argmin_k |r_q - e_qk|^2,   r_{q+1} = r_q - sg[e_q,index_q]
        quantized = project_out(sum_q e_q,index_q)
        loss_q = commitment_weight mean (r_q - sg[e_q,index_q])^2     (zero in eval)

    Every stage learns from its own residuals, as a `VectorQuantize` does; the gradient reaches x through each stage.

    Args:
        dim: dimension of the input and output vectors.
        num_quantizers: Q; optional if codebook_size is a tuple.
        codebook_size: K, or a tuple with one for each stage.
        codebook_dim: D, the dimension of the codes. If it is not dim, one pair of linear projections surrounds all
            stages.
        shared_codebook: all stages use one codebook, which learns from the residuals of all.
        diveq: learn the codes only by `fastvq.parts.directional_reparam` between x and the sum of its codes.
        heads: 1.
        quantize_dropout: in training, leave out the stages after a random one.
        quantize_dropout_cutoff_index: the lowest index that the last active stage may have.
        quantize_dropout_multiple_of: the number of active stages is rounded up to a multiple of this.
        quantize_dropout_per_item: draw a number of active stages for each item of a batch, not one for all.
        channel_last: vectors are (B, N, dim); if False, (B, dim, N).
        accept_image_fmap, accept_3d_fmap: x is (B, dim, H, W), or (B, dim, T, H, W).
        implicit_neural_codebook: every stage but the first transforms its codes by a network, conditioned on the sum
            of the codes before (`fastvq.parts.tables`); codes and networks learn by gradient.
        mlp_kwargs: dim_hidden and depth of these networks.
        preselect: number of codes that such a network transforms for each vector, those with the nearest guides: codes
            without a network, which learn from the residuals of their indices by a loss of weight 1. None: all K codes.
        beam_size, eval_beam_size: number of beams in training and in eval (`fastvq.parts.beam`).
        beam_score_quantizer_weights: weights of the stages' errors in the beam search.
        gradient: how the gradient g of the output reaches x: "stages", through the estimator of each stage, which is
            Q g for the straight-through estimator; "once", as if the sum of all codes were the code of x.
        quant_grad_frac: share of a stage's gradient that the stage before gets through the residual. 1 gives x the
            output's gradient once too, and no gradient of the losses of all stages but the first.
        return_zeros_for_masked_padding: return zeros for masked vectors; if False, return them unchanged.
        stage_axis: of the stages in indices: -1 for (B, N, Q), 1 for (B, Q, N), 0 for (Q, B, N).
        kmeans_one_stage: with kmeans_init, run k-means for one stage at each step. A stage learns from its turn on, and
            puts out zeros before: at once, later stages would start from the few residuals that one batch leaves them.
        settings: arguments of every stage's `VectorQuantize`: decay, kmeans_init, threshold_ema_dead_code ...

    Raises:
        ValueError: an argument is invalid; the message names it. TypeError: an unknown argument.

    Numerics: the search is exact for residuals rounded to float32, whatever the dtype of x (`fastvq.residual_search`).

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1 and section III-C (dropout); for options, see their parts.
    """

    decay = SharedSetting("_stages")
    commitment_weight = SharedSetting("_stages")
    sample_codebook_temp = SharedSetting("_stages")

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
        channel_last: bool = True,
        accept_3d_fmap: bool = False,
        quantize_dropout_per_item: bool = False,
        gradient: str = "stages",
        stage_axis: int = -1,
        kmeans_one_stage: bool = False,
        preselect: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("num_quantizers: must be given where codebook_size is one number")
        if num_quantizers is not None:
            check_sizes(num_quantizers=num_quantizers)
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        if num_quantizers is not None and num_quantizers != len(sizes):
            raise ValueError(f"num_quantizers: must be the number of stages, {len(sizes)}, got {num_quantizers}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size: must be one number where the codebook is shared, got {codebook_size}")
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap, accept_3d_fmap: only one of them may be True")
        if heads != 1:
            raise ValueError(f"heads: must be 1 for residual quantization, got {heads}")
        if implicit_neural_codebook and settings.get("codebook_diversity_loss_weight"):
            raise ValueError("codebook_diversity_loss_weight: must be 0 beside implicit_neural_codebook=True")
        if preselect is not None:
            check_sizes(preselect=preselect)
            if not implicit_neural_codebook:
                raise ValueError(f"preselect: must be None without implicit_neural_codebook=True, got {preselect}")
        if eval_beam_size is not None and beam_size is None:
            raise ValueError("beam_size: must be given beside eval_beam_size")
        for name, beams in (("beam_size", beam_size), ("eval_beam_size", eval_beam_size)):
            if beams is not None:
                check_sizes(**{name: beams})
        weights = (1.0,) * len(sizes) if beam_score_quantizer_weights is None else tuple(beam_score_quantizer_weights)
        if len(weights) != len(sizes):
            raise ValueError(f"beam_score_quantizer_weights: must be {len(sizes)} numbers, got {weights}")
        check_fractions(quant_grad_frac=quant_grad_frac)
        if gradient not in GRADIENTS_OF_STACKS:
            raise ValueError(f"gradient: must be one of {', '.join(GRADIENTS_OF_STACKS)}, got {gradient!r}")
        for name, given in (
            ("diveq", diveq),
            ("route_gradients_to_input=False", not settings.get("route_gradients_to_input", True)),
            ("sync_update_v", settings.get("sync_update_v", 0) > 0),
            ("directional_reparam", settings.get("directional_reparam", False)),
        ):
            if given and gradient == "once":
                raise ValueError(f"gradient: must be 'stages' beside {name}, got 'once'")
        if kmeans_one_stage and (shared_codebook or not settings.get("kmeans_init")):
            name = "shared_codebook must be False" if shared_codebook else "kmeans_init must be True"
            raise ValueError(f"kmeans_one_stage: {name} beside it")
        if quantize_dropout_per_item and beam_size is not None and beam_size > 1:
            raise ValueError(f"quantize_dropout_per_item: must be False beside beam_size={beam_size}")
        self._set_dropout(
            len(sizes),
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
            quantize_dropout_per_item,
        )
        if shared_codebook:
            settings["manual_ema_update"] = False  # the codes follow after the last stage anyway
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
        self.gradient, self.quant_grad_frac = gradient, 1.0 if diveq else quant_grad_frac
        self.kmeans_one_stage = kmeans_one_stage
        self._set_stage_axis(stage_axis)
        self.channel_last = channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.implicit_neural_codebook = implicit_neural_codebook
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.beam_score_weights = weights
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        self._history = History()
        self.project_in, self.project_out = projections(dim, codebook_dim)
        with in_the_name_of(self):
            self.layers = nn.ModuleList([VectorQuantize(dim=codebook_dim, codebook_size=k, **settings) for k in sizes])
        if self._stages_project:
            raise ValueError("codebook_dim: must be given to ResidualVQ itself")
        self.mlps: nn.ModuleList | tuple[None, ...] = (
            nn.ModuleList([NeuralCodes(codebook_dim, **(mlp_kwargs or {})) for _ in sizes[1:]])
            if implicit_neural_codebook
            else (None,) * (len(sizes) - 1)
        )
        self.preselect = preselect
        self.guides: nn.ParameterList | None = None
        if preselect is not None:
            self.guides = nn.ParameterList([stage.codebook.detach().clone() for stage in self._stages[1:]])
        if shared_codebook:
            for stage in self._stages:
                stage._codebook = self._stages[0]._codebook
                stage._in_place = self._stages[0]._in_place

    @property
    def _stages(self) -> list[VectorQuantize]:
        return cast("list[VectorQuantize]", list(self.layers))

    @property
    def freeze_codebook(self) -> bool:
        """True if the codebooks of all stages are frozen; assigning sets it for each of them."""
        return all(stage.freeze_codebook for stage in self._stages)

    @freeze_codebook.setter
    def freeze_codebook(self, frozen: bool) -> None:
        for stage in self._stages:
            stage.freeze_codebook = frozen

    @property
    def codebook_size(self) -> int:
        """K of the first stage."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes of all stages, (Q, K, D), or a tuple of (K_q, D) if the sizes differ."""
        codes = tuple(stage.codebook for stage in self._stages)
        return torch.stack(codes) if self.uniform_codebook_size else codes

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            mask: Tensor | None = None,
            indices: None = None,
            return_all_codes: Literal[False] = False,
            sample_codebook_temp: float | None = None,
            freeze_codebook: bool | None = None,
            beam_size: int | None = None,
            rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
            *,
            lens: Tensor | None = None,
            accum_ema_update: bool = False,
            n_quantizers: int | Tensor | None = None,
            start: int = 0,
            codes_gradient: bool = False,
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_all_codes: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, *, indices: Tensor | list[Tensor], **options: Any) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
        *,
        lens: Tensor | None = None,
        accum_ema_update: bool = False,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
        codes_gradient: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return (quantized, indices, losses) of x; with indices given, (quantized, the sum of cross entropies).

        Args:
            x: (B, N, dim), (B, dim) or (B, ..., dim); (B, dim, N) if not channel_last; (B, dim, H, W) if
                accept_image_fmap; (B, dim, T, H, W) if accept_3d_fmap. Any floating dtype.
            mask: bool, shaped as the vectors, as in `VectorQuantize`.
            indices: targets, shaped as this layer returns them, or a list with a tensor for each stage: the loss is the
                cross entropy between each stage's soft assignment and the targets that aren't -1. No stage is dropped.
            return_all_codes: also return the codes of each stage, as a fourth result.
            sample_codebook_temp, freeze_codebook: override the stages' own for this call.
            beam_size: overrides the layer's own for this call.
            rand_quantize_dropout_fixed_seed: seed of dropout; by default torch's generator draws one.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.
            accum_ema_update: keep this batch's statistics for the next learning step, or for `commit_ema_update`.
            n_quantizers: number of leading stages that take part, in training instead of a random one: for all items
                of the batch, or int (B,) with one for each; all stages by default. Not beside `indices`. Ranks that
                learn together must pass the same int, but may pass different tensors.
            start: the first stage that takes part, for x that the stages before have left as residual; less than each
                number.
            codes_gradient: return the codes as the stages put them out, from before the update, with the gradient of
                their estimators: for losses on the first stages, such as distillation.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, N, Q), (B, Q), (B, ..., Q) or (B, H, W, Q), or with the
            stages at `stage_axis`, -1 for dropped stages and excluded vectors; losses (Q,) float32, zero for dropped
            stages; codes (Q, B, N, D).

        Raises:
            ValueError, TypeError: an argument is invalid; the message names it.
        """
        stages, frozen = self._stages, 0
        for stage in stages:
            if stage._forward_hooks or stage._forward_pre_hooks or "forward" in vars(stage):
                self._warn_of_hooks()
            frozen += stage.freeze_codebook if freeze_codebook is None else freeze_codebook
        learning = self.training and frozen < self.num_quantizers
        partly = learning and frozen > 0
        repeatable = learning and may_be_recomputed()
        if codes_gradient and not return_all_codes:
            raise ValueError("codes_gradient: must be False without return_all_codes")
        no_options = mask is indices is beam_size is lens is n_quantizers is None
        no_options = no_options and not (return_all_codes or accum_ema_update or start)
        if no_options and not (repeatable or partly) and self._is_plain(stages, learning):
            return self._forward_plain(x, stages, learning)

        layout = self._layout(x)
        rows = layout.to_rows(x)
        rows_mask = layout.rows_mask(mask, lens)
        flat_mask = None if rows_mask is None else rows_mask.reshape(1, -1)
        projected = self._project_in(rows, rows_mask)
        if isinstance(indices, list):
            indices = torch.stack(indices, -1)
        elif indices is not None:
            indices = self._stages_last(indices)
        if indices is not None and indices.shape[-1:] != (self.num_quantizers,):
            raise ValueError(f"indices: must have shape (..., Q={self.num_quantizers}), got {tuple(indices.shape)}")
        if beam_size is not None:
            check_sizes(beam_size=beam_size)
        targets = None if indices is None else layout.indices_to_rows(indices).flatten(0, 1)[None]
        if targets is not None and (n_quantizers is not None or start):
            name, empty = ("start", "0") if n_quantizers is None else ("n_quantizers", "None")
            raise ValueError(f"{name}: must be {empty} beside indices, the targets of all stages")
        self._check_start(start)
        drops, seed = self.training and targets is None, rand_quantize_dropout_fixed_seed
        active = self._active_stages(n_quantizers, start, layout, x, drops, seed)
        if repeatable:
            self._history.replay(projected, self._unique_codebooks)
        learns = [learning and not (partly and stage.freeze_codebook) for stage in stages]
        if learning:
            self._initialize_stages(projected.detach(), flat_mask, learns, start)
            if self.kmeans_one_stage:  # the others wait for their turn
                learns = [learns[place] and stage._codebook.ready() for place, stage in enumerate(stages)]
                partly = partly or not all(learns)
        outputs: list[Tensor] | None = [] if codes_gradient else None
        known = self._beam_search(projected, flat_mask, beam_size, active, sample_codebook_temp)
        if targets is None and outputs is None and not partly and self._fits_one_pass(stages, learning):
            total, found, losses = self._quantize_in_one_pass(
                projected.flatten(0, 1),
                None if flat_mask is None else flat_mask[0],
                stages,
                learning,
                active,
                None if known is None else known[0],
                repeatable,
                accum_ema_update,
            )
        else:
            total, found, losses = self._quantize_by_stage(
                projected,
                flat_mask,
                learns,
                active,
                known,
                shape=(layout.batch, layout.rows),
                targets=targets,
                temperature=sample_codebook_temp,
                repeatable=repeatable,
                accumulate_only=accum_ema_update,
                outputs=outputs,
            )
        if repeatable:
            self._history.finish(self._unique_codebooks)
        if targets is None and known is not None and not self.training:
            stages = self._stages[start : start + len(losses)]
            losses = _weighted(losses, [s.commitment_weight if s.has_commitment_loss else 1 for s in stages])
        elif targets is None and not self.training:
            losses = torch.zeros_like(losses)
        if dropped := self.num_quantizers - found.shape[-1]:
            found = nn.functional.pad(found, (start, dropped - start), value=-1)
            losses = nn.functional.pad(losses, (start, dropped - start))
        found = found.view(*rows.shape[:2], self.num_quantizers)

        quantized = total.view(*rows.shape[:2], self.codebook_dim)
        if self.has_projections:
            quantized = project_codes_out(self.project_out, quantized, (found >= 0).any(-1))
        quantized = quantized.to(x.dtype)
        if rows_mask is not None and not self.return_zeros_for_masked_padding:
            quantized = torch.where(rows_mask[..., None], quantized, rows)
        if targets is not None:
            return tie_parameters(self, (layout.from_rows(quantized), losses.sum()))
        chosen = layout.indices(found)
        result = tie_parameters(self, (layout.from_rows(quantized), self._stages_out(chosen), losses))
        if outputs is not None:
            zeros = torch.zeros_like(outputs[0])
            after = self.num_quantizers - start - len(outputs)
            codes = torch.stack([*[zeros] * start, *outputs, *[zeros] * after])
            return (*result, codes.view(self.num_quantizers, *chosen.shape[:-1], self.codebook_dim))
        return (*result, self._codes(chosen)) if return_all_codes else result

    def _check_start(self, start: int) -> None:
        if start and self.implicit_neural_codebook:
            raise ValueError(f"start: must be 0 where codes depend on those of earlier stages, got {start}")

    def _is_plain(self, stages: list[VectorQuantize], learning: bool) -> bool:
        """Return whether `_forward_plain` can replace the general forward pass, by the settings and state of now."""
        beams = self.beam_size if self.training else self.eval_beam_size
        modules = self._modules
        # has_projections, without a call
        identities = type(modules["project_in"]) is type(modules["project_out"]) is nn.Identity
        if not identities or self.stage_axis != -1 or (beams or 1) > 1 or (self.training and self.quantize_dropout):
            return False
        if "embed" not in stages[0]._codebook._buffers and DistributedDataParallel._active_ddp_module is not None:
            return False  # parameters that take no part, because they are frozen
        for stage in stages if learning else ():
            if not stage._codebook.ready():
                return False
        return self._fits_one_pass(stages, learning)

    def _forward_plain(self, x: Tensor, stages: list[VectorQuantize], learning: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run the common case of `forward`, with the same results: layout, then all stages in one pass."""
        layout = self._layout(x)
        rows = layout.to_rows(x).reshape(-1, self.dim)
        quantized, indices, losses = self._quantize_in_one_pass(rows, None, stages, learning)
        if not self.training:
            losses = torch.zeros_like(losses)
        shape = (layout.batch, layout.rows)
        return (
            layout.from_rows(quantized.view(*shape, self.dim)),
            layout.indices(indices.view(*shape, self.num_quantizers)),
            losses,
        )

    def _fits_one_pass(self, stages: list[VectorQuantize], learning: bool) -> bool:
        """Return whether one pass can quantize all stages: each searches the residuals themselves, and no more."""
        if not self.uniform_codebook_size or not self._shares_space or self.quant_grad_frac != 0:
            return False
        if not stages[0].only_searches(learning):
            return False
        for name in _SETTINGS_OF_ONE_PASS if self.training else ():
            setting = getattr(stages[0], name)
            for stage in stages:  # an attribute of one stage may have been assigned
                own = getattr(stage, name)
                if own is not setting and (isinstance(own, Tensor) or own != setting):
                    return False
        return True

    @property
    def _shares_space(self) -> bool:
        """True if every stage compares the residuals themselves with its codes."""
        first = cast(VectorQuantize, self.layers[0])
        return not (first.use_cosine_sim or self.implicit_neural_codebook or self._stages_project)

    @property
    def _stages_project(self) -> bool:
        """True if a module stands in place of an identity of a stage."""
        for stage in self.layers:
            modules = stage._modules
            # has_projections, without a call
            if not (type(modules["project_in"]) is type(modules["project_out"]) is nn.Identity):
                return True
        return False

    def _quantize_in_one_pass(
        self,
        x: Tensor,
        mask: Tensor | None,
        stages: list[VectorQuantize],
        learning: bool,
        active: ActiveStages | None = None,
        known: Tensor | None = None,
        repeatable: bool = False,
        accumulate_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize rows x (R, D) by the stages in one pass, and let each stage learn.

        Args:
            mask: bool (R,), or None.
            learning: whether the codebooks learn.
            active: the stages that take part; all by default.
            known: indices (R, Q) of a beam search.
            repeatable: whether activation checkpointing may repeat this pass.
            accumulate_only: see `learn_together`.

        Returns:
            quantized (R, D), indices (R, active) and losses (active,).
        """
        first, start = stages[0], 0 if active is None else active.start
        stages = stages[start : active.number if active is not None and isinstance(active.number, int) else None]
        codebooks = self._stack(stages, copied=self.training)
        if known is not None:
            found = known[:, : len(stages)]
        else:
            found = residual_search(x.detach(), codebooks, mask=mask)
        if active is not None and isinstance(active.number, Tensor):
            found = active.fill_indices(found)
        quantized, _, losses, residuals = residual_quantize(
            x if self.training else x.detach(),
            codebooks,
            gradient="rotation" if first.rotation_trick else "ste",
            commitment_weight=1.0,
            indices=found,
            keep_residuals=learning,
            copy_codebooks=False,  # they are one already, where a backward may follow
        )
        indices = found.T[:, None]  # [Q, 1, R]
        if self.training or self._measures:
            observe_stages_([stage._health for stage in stages], indices, losses)
        if repeatable:
            self._history.record(x, self._unique_codebooks)
        if learning:
            self._learn(stages, residuals[:, None], indices, active, accumulate_only)
        weight = first.commitment_weight if self.training else 1
        if isinstance(weight, Tensor) or weight != 1:
            losses = weighted(losses, weight)
        return self._estimated(x, quantized, found), found, losses

    def _estimated(self, x: Tensor, quantized: Tensor, indices: Tensor) -> Tensor:
        """Return quantized (..., D) of x with indices (..., stages), its gradient once if the layer passes it so."""
        if self.gradient == "stages" or not self.training:
            return quantized
        estimate = rotate_to if self._stages[0].rotation_trick else straight_through
        return estimate(x, quantized.detach(), indices.amax(-1))

    def _quantize_by_stage(
        self,
        x: Tensor,
        mask: Tensor | None,
        learns: list[bool],
        active: ActiveStages,
        known: Tensor | None,
        *,
        shape: tuple[int, int],
        targets: Tensor | None,
        temperature: float | None,
        repeatable: bool,
        accumulate_only: bool,
        outputs: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize rows x (1, R, D) one stage after another, with any options of the stages.

        `learns` says which stages learn. The outputs (1, R, D) of the stages are appended to `outputs`. The tensors are
        those of `_quantize_in_one_pass`, with the same leading axis. With targets (1, R, Q), the losses are cross
        entropies.
        """
        residual = at_least_float32(x)
        start, total = residual, torch.zeros_like(residual)
        stages: list[VectorQuantize] = []
        steps: list[QuantizedRows] = []
        learns = learns[active.start :]
        for place, stage in enumerate(self._stages):
            if active.skips(place):
                continue
            step = stage.quantize_rows(
                self._rows_of(stage, residual),
                active.row_mask(place, mask, residual),
                shape=shape,
                learning=learns[len(stages)],
                indices=None if known is None else active.fill(place, known[..., len(stages)], -1),
                targets=None if targets is None else targets[..., place],
                temperature=temperature,
                table=self._table(place, total),
            )
            output = self._output_of(stage, step.quantized, step.indices)
            residual = residual - scale_gradient(output, self.quant_grad_frac)
            total = total + output
            stages.append(stage)
            steps.append(step)
            if outputs is not None:
                outputs.append(output)
        found = torch.stack([step.indices for step in steps], -1)
        if self.diveq and self.training:  # before learning draws random numbers, which a repeated pass doesn't
            absent = (found < 0).all(-1, keepdim=True)
            total = directional_reparam(start.masked_fill(absent, 0), total).masked_fill(absent, 0)
        total = self._estimated(start, total, found)
        if repeatable:
            self._history.record(x, self._unique_codebooks)
        pending = [place for place, step in enumerate(steps) if learns[place] and not step.learned]
        if pending:
            self._learn(
                [stages[place] for place in pending],
                [steps[place].inputs.detach() for place in pending],
                [steps[place].indices for place in pending],
                active,
                accumulate_only,
            )
        if any(learns) and self.shared_codebook:
            stages[0].update_in_place_optimizer()
        if targets is not None:
            losses = [step.cross_entropy for step in steps if step.cross_entropy is not None]
        elif self.training:
            losses = [
                active.of_any_row().fill(place, stage.losses(step, learning)[0] + self._guide_loss(place, step), 0)
                for place, (stage, step, learning) in enumerate(zip(stages, steps, learns, strict=False), active.start)
            ]
        else:
            losses = [step.commitment for step in steps]
        return total, found, torch.stack(losses)

    def _learn(
        self,
        stages: list[VectorQuantize],
        x: Tensor | list[Tensor],
        indices: Tensor | list[Tensor],
        active: ActiveStages | None,
        accumulate_only: bool,
    ) -> None:
        """Move the codebooks of the stages towards their rows x (1, R, D) with indices (1, R)."""
        flags = None
        if active is not None and isinstance(active.number, Tensor):  # a dropped stage doesn't decay
            number = active.of_any_row().number
            flags = [(number > self._stages.index(stage)).float() for stage in stages]  # type: ignore[union-attr]
        codebooks = [stage._codebook for stage in stages]
        learn_together(codebooks, x, indices, active=flags, accumulate_only=accumulate_only)

    def _stack(self, stages: list[VectorQuantize], *, copied: bool = False) -> list[Tensor]:
        """Return the codes of the stages as ops take them, without their gradient.

        A backward pass needs a copy, since stages may learn before it. Otherwise the kernels of the CPU read the codes
        where they are; those of other devices read one tensor.
        """
        codes = self._codes_of(stages)
        if copied or (self.uniform_codebook_size and not codes[0].is_cpu):
            return [torch.cat(codes).detach()]
        for place, one in enumerate(codes):
            if one.requires_grad:
                codes[place] = one.detach()
        return codes

    @staticmethod
    def _codes_of(stages: list[VectorQuantize]) -> list[Tensor]:
        """Return the codes (1, K, D) of each stage."""
        codes = []
        for stage in stages:
            codebook: Any = stage._modules["_codebook"]  # as in `Codebook.codes`, without a lookup by name
            codes.append(codebook.codes)
        return codes

    @property
    def _unique_codebooks(self) -> list[Codebook]:
        return list(dict.fromkeys(stage._codebook for stage in self._stages))

    @property
    def _unready_stages(self) -> list[VectorQuantize]:
        """The stages whose codebooks wait for k-means."""
        return [stage for stage in self._stages if not stage._codebook.ready()]

    def _initialize_stages(self, x: Tensor, mask: Tensor | None, learns: list[bool], start: int) -> None:
        """Run k-means for the learning stages from `start` on, on the residuals of a greedy search, stage by stage."""
        if not self._unready_stages:
            return
        residual = at_least_float32(x)
        total = torch.zeros_like(residual)
        for place, stage in list(enumerate(self._stages))[start:]:
            rows = self._rows_of(stage, residual).detach()
            if learns[place] and not stage._codebook.ready():
                stage._codebook.initialize_(rows, mask)
                if self.guides is not None and place and stage._codebook.ready():
                    self.guides[place - 1].data.copy_(stage.codebook)
                if self.kmeans_one_stage:
                    return
            table = self._table_of(place, total)
            indices = table.nearest(rows, mask)
            output = self._output_of(stage, table.lookup(indices), indices).detach()
            residual, total = residual - output, total + output

    def _rows_of(self, stage: VectorQuantize, residual: Tensor) -> Tensor:
        """Return the residuals (1, R, D) as a stage compares them with its codes."""
        if not stage.has_projections:
            return stage.split_rows(residual)
        dtype = parameter_dtype(stage.project_in, default=residual.dtype)
        return stage.split_rows(residual.to(dtype)).to(residual.dtype)

    def _table(self, place: int, total: Tensor) -> Callable[[Tensor], Table] | None:
        """Return a function that makes the table of a stage from its codes, given the sum (1, R, D) of those before.

        None stands for one table of the codes themselves for all rows.
        """
        network = self.mlps[place - 1] if place > 0 else None
        if network is None:
            return None
        metric = self._stages[place]._codebook.metric
        guides = None if self.guides is None else self.guides[place - 1]
        return lambda codes: Implicit(
            codes, cast(NeuralCodes, network), total, metric, guides=guides, preselect=self.preselect
        )

    def _guide_loss(self, place: int, step: QuantizedRows) -> Tensor | float:
        """Return the mean squared distance of a stage's residuals to the guides of their indices; 0 without guides."""
        if self.guides is None or place == 0:
            return 0.0
        guides = lookup(self.guides[place - 1], step.indices)
        errors = mean_squared_errors(step.inputs.detach(), guides, step.indices)
        return errors.sum() / (step.indices >= 0).sum().clamp_min(1)

    def _table_of(self, place: int, total: Tensor, detached: bool = True) -> Table:
        """Return the table of a stage with its current codes, given the sum (1, R, D) of those before."""
        codebook, make = self._stages[place]._codebook, self._table(place, total)
        codes = codebook.codes.detach() if detached else codebook.codes
        return Shared(codes, codebook.metric) if make is None else make(codes)

    def _beam_search(
        self, x: Tensor, mask: Tensor | None, beam_size: int | None, active: ActiveStages, temperature: float | None
    ) -> Tensor | None:
        """Return the indices (1, R, active) of a beam search, or None if the search is greedy."""
        own = self.beam_size if self.training else self.eval_beam_size
        beams = own if beam_size is None else beam_size
        if beams is None or beams <= 1:
            return None
        if isinstance(active.number, Tensor) and active.number.dim():
            raise ValueError(f"n_quantizers: must be one number for all items beside beam_size={beams}")
        x = x.detach()
        x = at_least_float32(x)
        stages = [
            self._beam_stage(place, temperature) for place in range(self.num_quantizers) if not active.skips(place)
        ]
        own_weights = self.beam_score_weights[active.start : active.start + len(stages)]
        weights: Sequence[float] | Tensor = own_weights
        if isinstance(active.number, Tensor):  # after the last active stage, the best beam stays the first
            is_active = active.start + torch.arange(len(stages), device=x.device) < active.number
            weights = x.new_tensor(own_weights, dtype=torch.float64) * is_active
        return beam_search(x[0], stages, beams, weights=weights, mask=None if mask is None else mask[0])[None]

    def _beam_stage(self, place: int, temperature: float | None = None) -> Stage:
        """Return the stage as `beam_search` takes it."""
        stage = self._stages[place]
        temperature = stage.sample_codebook_temp if temperature is None else temperature

        def propose(residuals: Tensor, totals: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
            table = self._table_of(place, totals[None])
            rows, own_mask = self._rows_of(stage, residuals[None]), None if mask is None else mask[None]
            indices = stage.choose(table, rows, own_mask, min(k, table.size), temperature)
            codes = table.lookup(indices)
            errors = (rows[0, :, None].double() - codes[0].double()).square().mean(-1)
            return indices[0], self._output_of(stage, codes, indices)[0], errors

        return propose

    def encode(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return the indices of x, shaped as `forward` returns them, with the same arguments. No state changes.

        Raises:
            CodebookError: no code of a stage is finite, so that no vector has an index.
        """
        layout = self._layout(x)
        rows_mask = layout.rows_mask(mask, lens)
        flat_mask = None if rows_mask is None else rows_mask.reshape(1, -1)
        projected = self._project_in(layout.to_rows(x)).detach()
        self._check_start(start)
        active = self._active_stages(n_quantizers, start, layout, x)
        found = self._beam_search(projected, flat_mask, self.eval_beam_size, active, 0.0)
        if found is None:
            found = self._greedy_search(projected, flat_mask, active)
        check_some_code("codebooks", found[0], self._codes_of(self._stages[start : start + found.shape[-1]]))
        if isinstance(active.number, Tensor):
            found = active.fill_indices(found)
        if dropped := self.num_quantizers - found.shape[-1]:
            found = nn.functional.pad(found, (start, dropped - start), value=-1)
        return self._stages_out(layout.indices(found.view(layout.batch, layout.rows, self.num_quantizers)))

    def _greedy_search(self, x: Tensor, mask: Tensor | None, active: ActiveStages) -> Tensor:
        """Return the indices (1, R, active) of x (1, R, D)."""
        only_mask = None if mask is None else mask[0]
        count = active.number if isinstance(active.number, int) else self.num_quantizers
        if self._shares_space:
            return residual_search(x[0], self._stack(self._stages[active.start : count]), mask=only_mask)[None]
        stages = [self._beam_stage(place, 0.0) for place in range(active.start, count)]
        return beam_search(at_least_float32(x[0]), stages, 1, mask=only_mask)[None]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (Q, ..., D) of indices (..., Q), zeros for -1. Indices of the first stages alone suffice.

        The stages of the indices are at `stage_axis`.
        """
        return self._codes(self._checked_stages(self._stages_last(indices)))

    def get_output_from_indices(
        self, indices: Tensor, *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the quantized output of `forward` for these indices, in its layout.

        Args:
            indices: as `forward` returns them, or those of the first stages alone.
            n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        self._check_start(start)
        indices = self._chosen_stages(self._stages_last(indices), n_quantizers, start)
        total = self._sum_of_codes(indices)
        if total is None:
            indices = self._checked_stages(indices)
            total = self._codes(indices).sum(0)
        if self.has_projections:
            total = project_codes_out(self.project_out, total, (indices >= 0).any(-1))
        return codes_in_layout(total, self._channel_first)

    def _sum_of_codes(self, indices: Tensor) -> Tensor | None:
        """Return the sum (..., D) of the codes of indices (..., 1 to Q) by the op that `forward` computes it by.

        None stands for indices or codes that it does not take, or takes no faster: codes that get a gradient, or that
        it would have to stack.
        """
        if self.implicit_neural_codebook or self._stages_project:
            return None
        if torch.compiler.is_compiling() or type(indices) is not Tensor:
            return None
        if indices.dtype != torch.int64 or not indices.is_cpu or not 1 <= indices.shape[-1] <= self.num_quantizers:
            return None
        codes = self._codes_of(self._stages[: indices.shape[-1]])
        first = codes[0]
        if not first.is_cpu or (torch.is_grad_enabled() and any(one.requires_grad for one in codes)):
            return None
        rows = indices.reshape(-1, len(codes))
        start = first.new_zeros(len(rows), self.codebook_dim)
        try:
            total, _, _ = residual_quantize_forward(start, codes, rows, False)
        except IndexError:
            self._checked_stages(indices)  # names the stage
            raise
        return total.view(*indices.shape[:-1], self.codebook_dim)

    def _codes(self, indices: Tensor) -> Tensor:
        """Return the codes (Q, ..., D) of indices (..., 1 to Q), zeros for the missing stages."""
        if self.implicit_neural_codebook:
            codes = self._implicit_codes(indices)
        else:
            found = [
                self._output_of(stage, nn.functional.embedding(one.clamp_min(0), stage._codebook.codes[0]), one)
                for stage, one in zip(self._stages, indices.unbind(-1), strict=False)
            ]
            codes = torch.stack(found).masked_fill((indices < 0).movedim(-1, 0).unsqueeze(-1), 0)
        missing = self.num_quantizers - len(codes)
        return torch.cat([codes, codes.new_zeros(missing, *codes.shape[1:])]) if missing else codes

    def _implicit_codes(self, indices: Tensor) -> Tensor:
        """Return the codes (stages, ..., D) of indices (..., stages), each stage's given the sum of those before."""
        total = self._stages[0]._codebook.embed.new_zeros(1, indices[..., 0].numel(), self.codebook_dim)
        codes: list[Tensor] = []
        for place, one in enumerate(indices.unbind(-1)):
            chosen = one.flatten()[None]
            found = self._table_of(place, total, detached=False).lookup(chosen)
            codes.append(self._output_of(self._stages[place], found, chosen))
            total = total + codes[-1]
        return torch.stack(codes).view(len(codes), *indices.shape[:-1], self.codebook_dim)

    def reinitialize_(self) -> None:
        """Call `VectorQuantize.reinitialize_` of every stage; implicit neural codebooks keep their networks."""
        for stage in {stage._codebook: stage for stage in self._stages}.values():
            stage.reinitialize_()
        for place, guides in enumerate(self.guides or (), 1):
            guides.data.copy_(self._stages[place].codebook)
        self._history.clear()
        self.reset_health()

    @torch.no_grad()
    def fit(
        self, batches: Iterable[Any], *, inputs: Callable[[Any], Tensor] | None = None, iterations: int = 10
    ) -> list[Fitted]:
        """Fit the codebooks to a data set, one stage after another, as `VectorQuantize.fit` does one codebook.

        Each stage reads the data set iterations + 1 times, and is fitted to what the stages before leave. Arguments and
        errors are those of `VectorQuantize.fit`; the result has one for each stage.

        Raises:
            ValueError: a stage is frozen, the stages share their codebook, or their codes are computed from others.
        """
        for name in ("shared_codebook", "implicit_neural_codebook"):
            if getattr(self, name):
                raise ValueError(f"{name}: must be False to fit the stages one by one")
        refuse_frozen(self._stages)
        start = passes(batches, inputs)
        device = self._stages[0]._codebook.embed_avg.device

        def residuals(place: int) -> Iterator[Tensor]:
            for x in start():
                rows = self._layout(x).to_rows(x).to(device)
                residual = self._project_in(rows, None).float()
                for stage in self._stages[:place]:
                    indices = stage._codebook(self._rows_of(stage, residual))
                    codes = Shared(stage._codebook.codes).lookup(indices)
                    residual = residual - self._output_of(stage, codes, indices)
                yield residual[0]

        fitted = [
            stage.fit(Passes(partial(residuals, place)), iterations=iterations)
            for place, stage in enumerate(self._stages)
        ]
        self._history.clear()
        return fitted

    def resize_(self, codebook_size: int) -> None:
        """Change the number of codes of each stage, as `VectorQuantize.resize_` does.

        Raises:
            ValueError: the stages share their codebook, or `VectorQuantize.resize_` refuses.
        """
        if self.shared_codebook:
            raise ValueError("shared_codebook: must be False to change the number of codes")
        if self.guides is not None:
            raise ValueError("preselect: must be None to change the number of codes, which have guides")
        for stage in self._stages:
            stage.resize_(codebook_size)
        self.codebook_sizes = (codebook_size,) * self.num_quantizers
        self.uniform_codebook_size = True
        self._history.clear()

    def commit_ema_update(self) -> None:
        """Learn from the statistics that `forward(..., accum_ema_update=True)` has kept, if there are any."""
        held = [codebook for codebook in self._unique_codebooks if codebook.held_counts is not None]
        none = [codebook.embed.new_zeros(1, 0, self.codebook_dim) for codebook in held]
        learn_together(
            held,
            none,
            [rows.new_zeros(1, 0, dtype=torch.int64) for rows in none],
            active=[rows.new_zeros(()) for rows in none],  # a stage that was dropped throughout doesn't decay
        )

    def _project_in(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return rows (B, N, dim) as the stages quantize them, (1, R, D).

        If there is a projection, rows that are not finite or outside the mask (B, N) become NaN.
        """
        if not self.has_projections:
            return rows.reshape(1, rows.shape[0] * rows.shape[1], rows.shape[2])
        rows, mask = exclude_non_finite(rows, mask)
        projected = projected_rows(self.project_in, rows)
        if projected.dtype in (torch.float16, torch.bfloat16):
            projected = projected.float()  # no rounding between the projections
        return nan_fill(projected, mask).flatten(0, 1)[None]

    def _layout(self, x: Tensor) -> Layout:
        return layout_of(
            x,
            self.dim,
            channel_last=self.channel_last,
            image=self.accept_image_fmap,
            video=self.accept_3d_fmap,
        )

    @property
    def _channel_first(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last


_SETTINGS_OF_ONE_PASS = (
    "rotation_trick",
    "route_gradients_to_input",
    "directional_reparam",
    "stochastic_sample_codes",
    "commitment_use_cross_entropy_loss",
    "codebook_diversity_loss_weight",
    "orthogonal_reg_weight",
    "learnable_codebook",
    "commitment_weight",
)
"""The settings that all stages must have in common, in training, where one pass quantizes all of them."""


def _weighted(losses: Tensor, weights: Sequence[float | Tensor]) -> Tensor:
    """Return losses (Q,) times the weight of each."""
    first = weights[0]
    for weight in weights:
        if weight is not first and (isinstance(weight, Tensor) or weight != first):
            return torch.stack([weighted(loss, own) for loss, own in zip(losses, weights, strict=True)])
    return weighted(losses, first)
