"""Dtypes of state under casts and autocast, and tensors that are not saved."""

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


def may_change(value: float | Tensor) -> bool:
    """Return whether a number has to reach an op as a tensor.

    A compiled graph takes a number that changes from call to call as an input, unless it is an option of an op: then
    each value would be compiled anew.
    """
    return torch.compiler.is_compiling() or isinstance(value, Tensor)


def as_scalar(value: float | Tensor) -> Tensor:
    """Return a number as a tensor () float64, on the CPU unless it is a tensor."""
    if isinstance(value, Tensor):
        return value.double()
    # A sum, because compilers turn a changing number into a tensor in arithmetic alone: `full` would be compiled anew.
    return torch.zeros((), dtype=torch.float64, device="cpu") + value


class Unsaved:
    """Mixin, before nn.Module, of modules with tensors that are neither parameters nor buffers.

    Statistics belong to one process: they are not saved, averaged by `AveragedModel`, or broadcast by DDP, which would
    replace the counts of every rank by those of the first. Constants follow from the arguments of the constructor. Both
    keep their dtype and follow the module to other devices, but are never without values: a module that is built or put
    on "meta" keeps them where they are, so that `to_empty` and loading have nothing to restore.
    """

    _statistics: tuple[str, ...] = ()
    _constants: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name in self._statistics + self._constants:
            tensor = getattr(self, name)
            if tensor is not None:
                device = fn(tensor.new_empty(0)).device
                if device.type != "meta" and device != tensor.device:
                    self._move_(name, tensor, device)
        return self

    def follow_(self, device: torch.device) -> None:
        """Move the tensors to the device of what they are used with.

        A module that is loaded with assign=True, or sharded, is not told of its new device.
        """
        for name in self._statistics + self._constants:
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                self._move_(name, tensor, device)

    def _move_(self, name: str, tensor: Tensor, device: torch.device) -> None:
        kept: dict[str, Tensor] = self.__dict__.setdefault("_kept_from_meta", {})
        if device.type == "meta":  # a pass that only computes shapes
            kept[name] = tensor
            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        else:
            moved = kept.pop(name, tensor).to(device)
        setattr(self, name, fixed_address(moved) if name in self._statistics else moved)


def home_device() -> torch.device:
    """Return the device for tensors that must have values: torch's default device, or the CPU in place of "meta"."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def zero_statistic(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return zeros to be changed in place, for an attribute in `Unsaved._statistics`."""
    return fixed_address(torch.zeros(shape, dtype=dtype, device=home_device()))


def constant(values: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor of Python numbers, for an attribute in `Unsaved._constants`."""
    return torch.tensor(values, dtype=dtype, device=home_device())


def fixed_address(tensor: Tensor) -> Tensor:
    """Mark a tensor as one that compiled graphs may write to at its address, as they do to buffers, and return it."""
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]  # as mark_static_address does
    return tensor
