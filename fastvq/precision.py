"""Dtypes of state under casts and autocast, and unsaved state on the device "meta"."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastvq.backends.devices import has_float64


class KeepsPrecision:
    """Mixin, before nn.Module, of modules whose state moves to other devices but keeps its dtype.

    A moving average or a codebook that is rounded to half precision stops learning.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[misc]


class KeepsBuffers:
    """Mixin, before nn.Module, of modules whose buffers named in `_kept_buffers` keep their dtype."""

    _kept_buffers: tuple[str, ...] = ()
    _buffers: dict[str, Tensor | None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers[name] for name in self._kept_buffers if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float64 if it has that dtype, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices without it."""
    return torch.float64 if has_float64(device.type) else torch.float32


def full_precision(like: Tensor) -> AbstractContextManager[None]:
    """Return a context in which autocast is off on the device of `like`."""
    if like.is_meta:  # has no autocast
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


class ZeroOnMaterialize:
    """Mixin, first among the bases, of modules whose unsaved buffers are initially zero.

    If the module was built on the device "meta", these buffers are set to zero when they get memory: in `to_empty`,
    which would leave them uninitialized, and in `load_state_dict`, by `materialize_unsaved_buffers_`.
    """

    _buffers: dict[str, Tensor | None]
    _non_persistent_buffers_set: set[str]

    def _without_memory(self) -> list[tuple[str, Tensor]]:
        unsaved = ((name, self._buffers[name]) for name in self._non_persistent_buffers_set)
        return [(name, buffer) for name, buffer in unsaved if buffer is not None and buffer.is_meta]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        waiting = self._without_memory()
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, _ in waiting:
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                buffer.zero_()
        return self


def materialize_unsaved_buffers_(module: Any, state_dict: dict[str, Any]) -> None:
    """Set the unsaved buffers of `module` that are on "meta" to zeros on the device of `state_dict`."""
    device = next((value.device for value in state_dict.values() if isinstance(value, Tensor)), None)
    for part in module.modules():
        if isinstance(part, ZeroOnMaterialize) and device is not None and device.type != "meta":
            for name, buffer in part._without_memory():
                part._buffers[name] = torch.zeros_like(buffer, device=device)
