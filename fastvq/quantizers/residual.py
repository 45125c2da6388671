"""The stack of stages that all residual quantizers share; dropout may leave out the last stages."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Monitored
from fastvq.parts.arguments import check_sizes, check_tensors
from fastvq.parts.dropout import ActiveStages, QuantizeDropout
from fastvq.parts.indices import checked_indices
from fastvq.parts.projection import project_codes_out
from fastvq.parts.shapes import Layout


class SharedState:
    """Mixin, before nn.Module, of modules whose parts may share tensors: a codebook, a bridge, a transform.

    As in vector_quantize_pytorch, the state has each shared tensor under the names of all parts. All but the first are
    copies there, because safetensors saves no tensors that share memory. On loading, one of the names suffices.
    """

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("keep_vars", args[2] if len(args) > 2 else False):
            return state
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for names in self._shared_names(prefix):
            for name in names[1:]:
                if name in state:
                    state[name] = state[name].clone()
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for names in self._shared_names(prefix):
            given = next((state_dict[name] for name in names if name in state_dict), None)
            for name in names if given is not None else ():
                state_dict.setdefault(name, given)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _shared_names(self, prefix: str) -> list[list[str]]:
        """Return the names of each tensor that has more than one."""
        names: dict[int, list[str]] = {}
        for find in ("named_parameters", "named_buffers"):
            for name, tensor in getattr(self, find)(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(prefix + name)
        return [found for found in names.values() if len(found) > 1]


class SharedSetting:
    """Setting of all the layers that a layer consists of: assigned to each of them, read from the first.

    Args:
        parts: name of the layer's attribute that lists them.

    Raises:
        AttributeError: on assignment, a part has no such setting.
    """

    def __init__(self, parts: str) -> None:
        self.parts = parts

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        return self if layer is None else getattr(getattr(layer, self.parts)[0], self.name)

    def __set__(self, layer: Any, value: Any) -> None:
        for part in getattr(layer, self.parts):
            if not hasattr(part, self.name):
                raise AttributeError(f"{self.name}: {type(part).__name__} has no such attribute")
            setattr(part, self.name, value)


class ResidualStack(SharedState, Monitored, nn.Module):
    """Base of quantizers whose stages each quantize the residual of the stages before.

    State: `layers`, the stages, which a subclass sets; its `_stages` returns them with their type.
    """

    layers: nn.ModuleList
    stage_axis = -1  # of indices
    least_stages = 1
    """The least number of stages of an item; 0 for a quantizer beside another, where the other may suffice."""

    def _set_dropout(
        self, stages: int, enabled: bool, cutoff_index: int, multiple_of: int, per_item: bool = False
    ) -> None:
        """Set the number of stages, and the settings of `fastvq.parts.dropout`.

        Raises:
            ValueError: a setting is out of range; the message names it.
        """
        check_sizes(num_quantizers=stages)
        self.num_quantizers = stages
        self.quantize_dropout = enabled and stages > 1
        self.quantize_dropout_cutoff_index = cutoff_index
        self.quantize_dropout_multiple_of = multiple_of
        self.quantize_dropout_per_item = per_item
        self._dropout.check()

    @property
    def _dropout(self) -> QuantizeDropout:
        return QuantizeDropout(
            self.num_quantizers,
            self.quantize_dropout,
            self.quantize_dropout_cutoff_index,
            self.quantize_dropout_multiple_of,
            self.quantize_dropout_per_item,
        )

    @property
    def _stages(self) -> list[Any]:
        return list(self.layers)

    def _set_stage_axis(self, stage_axis: int) -> None:
        """Set the axis of the stages in indices: -1 for (B, ..., Q), 1 for (B, Q, ...), 0 for (Q, B, ...).

        Raises:
            ValueError: it is another number.
        """
        if stage_axis not in (-1, 0, 1):
            raise ValueError(f"stage_axis: must be -1, 0 or 1, got {stage_axis}")
        self.stage_axis = stage_axis

    def _stages_out(self, indices: Tensor) -> Tensor:
        """Return indices (..., Q) with the stages at `stage_axis`."""
        return indices if self.stage_axis == -1 else indices.movedim(-1, self.stage_axis)

    def _stages_last(self, indices: Tensor) -> Tensor:
        """Return indices with the stages at `stage_axis` as (..., Q)."""
        check_tensors(indices=indices)
        return indices if self.stage_axis == -1 else indices.movedim(self.stage_axis, -1)

    def _active_stages(
        self,
        n_quantizers: int | Tensor | None,
        start: int,
        layout: Layout,
        x: Tensor,
        drops: bool = False,
        seed: int | Tensor | None = None,
    ) -> ActiveStages:
        """Return the stages of the arguments `n_quantizers` and `start`, or with `drops` a random number of them.

        Raises:
            ValueError, TypeError: a number is out of range, or no integer.
        """
        active = ActiveStages.of_call(
            n_quantizers, start, items=layout.batch, stages=self.num_quantizers, least=self.least_stages
        )
        if n_quantizers is None and not drops:
            return active
        if n_quantizers is None:
            dropout = self._dropout._replace(cutoff_index=max(start, self.quantize_dropout_cutoff_index))
            return dropout.draw(drops, x, seed, items=layout.batch, rows=layout.rows)._replace(start=start)
        if isinstance(active.number, Tensor):
            active = active._replace(number=active.number.to(x.device))
        return active.of_rows(layout.rows)

    @staticmethod
    def _chosen_stages(indices: Tensor, n_quantizers: int | Tensor | None, start: int) -> Tensor:
        """Return indices (B, ..., stages) for decoding, -1 for the stages that `n_quantizers` and `start` leave out.

        Raises:
            ValueError, TypeError: a number is out of range of these stages, or no integer.
        """
        check_tensors(indices=indices)
        if n_quantizers is None and not start:
            return indices
        items, *others, stages = indices.shape
        active = ActiveStages.of_call(n_quantizers, start, items=items, stages=stages)
        if isinstance(active.number, int):
            indices = indices[..., : active.number]
        else:
            number = active.number.to(indices.device)
            active = active._replace(number=number.view(items, *[1] * len(others)))
        return torch.stack([active.fill(stage, own, -1) for stage, own in enumerate(indices.unbind(-1))], -1)

    @property
    def _monitored(self) -> list[Monitored]:
        return list(self._stages)

    def _warn_of_hooks(self) -> None:
        """Warn if something waits for calls of a stage, which never come: the stack runs the parts of its stages."""
        for place, stage in enumerate(self.layers):
            if stage._forward_hooks or stage._forward_pre_hooks or "forward" in vars(stage):
                _warn(
                    f"layers.{place}: has hooks or a forward of its own, which {type(self).__name__} never calls: it"
                    " runs its stages together; register hooks on the whole quantizer, or put modules in place of the"
                    " stage's project_in and project_out"
                )

    @staticmethod
    def _output_of(stage: Any, codes: Tensor, indices: Tensor) -> Tensor:
        """Return the output of a stage for its codes (..., D) with indices (...), projected if it has a projection."""
        if type(stage.project_out) is nn.Identity:
            return codes
        return project_codes_out(stage.project_out, codes, indices >= 0).to(codes.dtype)

    def _checked_stages(self, indices: Tensor) -> Tensor:
        """Return indices (..., 1 to Q) for decoding, as `checked_indices` of `fastvq.parts.indices` returns them."""
        check_tensors(indices=indices)
        given, most = indices.shape[-1], self.num_quantizers
        if not 1 <= given <= most:
            raise ValueError(f"indices: must have 1 to {most} stages at axis {self.stage_axis}, got {given}")
        return checked_indices(indices, [stage.codebook_size for stage in self._stages])


@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    """Warn, in a compiled program while it is traced."""
    warnings.warn(message, stacklevel=4)
