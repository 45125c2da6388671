"""Reading and writing of codes where a module really keeps them: sharded, parametrized or plain."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "run a forward pass in training before that, or let neither k-means, averages nor replacement move the codes"


@torch.no_grad()
def read(module: nn.Module, name: str) -> Tensor:
    """Return a float32 copy of a parameter or buffer (H, K, D), not rounded to the dtype that FSDP computes in."""
    tensor = getattr(module, name).detach()
    for sharded in sharded_parameters(module, name):
        if tensor.dtype != sharded.dtype:
            tensor = sharded.detach()
    if is_dtensor(tensor):
        tensor = tensor.full_tensor()
    return tensor.to(torch.float32, copy=True)


@torch.no_grad()
def write_(module: nn.Module, name: str, values: Tensor) -> None:
    """Write values (H, K, D) to a parameter or buffer, wherever it is kept.

    FSDP's `fully_shard` computes with a gathered copy that it drops afterwards, so that this rank's shard is written
    too. A parametrized tensor is assigned, for which the parametrization needs a right_inverse.

    Raises:
        RuntimeError: the tensor is computed from others, so that what is written would be lost.
    """
    tensor = module._buffers.get(name)
    tensor = module._parameters.get(name) if tensor is None else tensor
    if tensor is None or _is_flat(tensor):
        _assign(module, name, values)
        return
    if torch.compiler.is_compiling():
        tensor.copy_(values)
        return
    if is_dtensor(tensor):
        _write_shard_(tensor, values)
    else:
        tensor.copy_(values)
    for sharded in sharded_parameters(module, name):
        if sharded is not tensor:
            _write_shard_(sharded, values)


def sharded_parameters(module: nn.Module, name: str) -> Iterator[Any]:
    """Yield the sharded parameter (DTensor) behind a parameter that `fully_shard` manages, if it does."""
    states = sys.modules.get("torch.distributed._composable_state")
    if states is None or torch.compiler.is_compiling() or name not in module._parameters:
        return
    for reference in list(states._module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for managed in getattr(group, "fsdp_params", ()):
                info = managed._module_info
                if info.module is module and info.param_name == name:
                    yield managed.sharded_param


def refuse_sharded(module: nn.Module, option: str) -> None:
    """Check that `fully_shard` manages no parameter of the module, which an optimizer of its own steps.

    Raises:
        RuntimeError: it does: a step would change gathered copies, which are dropped, or what no longer is a parameter.
    """
    if "torch.distributed._composable_state" not in sys.modules:
        return
    for part in module.modules():
        for name in part._parameters:
            if next(sharded_parameters(part, name), None) is not None:
                raise RuntimeError(
                    f"{option}: its steps would be lost, since fully_shard has sharded the parameter {name}: name it in"
                    " fully_shard's ignored_params, or let the model's optimizer step it"
                )


def refuse_dtensor(name: str, tensor: Tensor) -> None:
    """Check that a tensor is a plain one.

    Raises:
        RuntimeError: it is a DTensor, as outside of the forward pass of a module that `fully_shard` has sharded.
    """
    if not torch.compiler.is_compiling() and is_dtensor(tensor):
        raise RuntimeError(
            f"{name}: is sharded over ranks (a DTensor); call the module's forward, which gathers it, or register the"
            " method with torch.distributed.fsdp.register_fsdp_forward_method"
        )


def _is_flat(tensor: Tensor) -> bool:
    """Return whether a tensor is a view of all parameters, which `FullyShardedDataParallel` puts in place of each."""
    return type(tensor) is Tensor and tensor.requires_grad and tensor._is_view()


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is sharded over ranks."""
    return type(tensor).__name__ == "DTensor"  # by name, because importing it takes long


def _write_shard_(parameter: Any, values: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    values = values.to(parameter.dtype).contiguous()
    shard = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local = parameter.to_local()
    local.copy_(shard.to_local().to(local.device))


def _assign(module: nn.Module, name: str, values: Tensor) -> None:
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is None or name not in parametrizations:
        raise RuntimeError(
            f"{name}: is neither a parameter nor a buffer of the codebook now, but computed from others (by pruning,"
            f" weight norm or flat parameters of FSDP), so that what is written to it would be lost: {REMEDY}"
        )
    try:
        setattr(module, name, values)
    except Exception as error:
        raise RuntimeError(
            f"{name}: cannot be written through its parametrization ({error}): give that a right_inverse, or {REMEDY}"
        ) from error


class LostCodes:
    """Check that the codes which `initted` speaks of are those of the parameter that is there now.

    `functional_call` may put other tensors in the place of the parameters for one call. What k-means writes to one of
    them stays there, while `initted` of the module says that k-means has run.
    """

    def __init__(self) -> None:
        self.seen: Callable[[], Tensor | None] = lambda: None

    def __call__(self, tensor: Tensor | None) -> bool:
        """Return whether a parameter is all zeros, as before k-means. One that once was not is not read again.

        Reading waits for the device. A traced graph doesn't.
        """
        if tensor is None or tensor is self.seen() or torch.compiler.is_compiling():
            return False
        if type(tensor.data) is not Tensor or tensor.is_meta or bool(tensor.detach().any()):
            self.seen = weakref.ref(tensor)
            return False
        return True

    # What has been seen are tensors of this module, not of copies.
    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, _: dict[int, Any]) -> LostCodes:
        return LostCodes()


class WriteCheck:
    """Check that an optimizer keeps what is written to a parameter.

    An optimizer that keeps a copy of its parameters, such as float32 master weights of a model in half precision,
    writes that over the parameter at each step. Codes that k-means has set would be lost without a word.

    The first steps after a write are checked, which waits for the device: the parameter must not be much nearer to its
    values before the write than to what was written.
    """

    CHECKS = 8
    FACTOR = 0.01

    def __init__(self) -> None:
        self.left = self.CHECKS
        self.written: tuple[Tensor, Tensor] | None = None
        self.place: Callable[[], Tensor | None] = lambda: None

    def record(self, place: Tensor | None, before: Tensor, after: Tensor) -> None:
        """Remember a write of `after` over `before`, the values of the parameter `place`."""
        if self.left and not torch.compiler.is_compiling():
            if self.written is not None and self.place() is place:  # no optimizer step since the write before
                before = self.written[0]
            self.written = (before, after.detach().clone())
            self.place = (lambda: None) if place is None else weakref.ref(place)

    def check(self, name: str, place: Tensor | None, current: Tensor) -> None:
        """Compare the current values with the last write, if one to this parameter is remembered.

        Raises:
            RuntimeError: the write is lost.
        """
        if self.written is None or torch.compiler.is_compiling() or current.is_meta:
            return
        if self.place() is not place:  # `functional_call` puts other tensors in the place of the parameter for a call
            return
        before, after = self.written
        self.left -= 1
        far = (current.detach() - after).square().sum()
        if self.left and not far:  # no optimizer step since
            return
        self.written, self.left = None, 0
        if (current.detach() - before).square().sum() < self.FACTOR * far:
            raise RuntimeError(
                f"{name}: the codes that were written to it are lost, since an optimizer has put a copy of the earlier"
                f" values in their place (float32 master weights?). Build the optimizer after that: {REMEDY}"
            )

    # What is remembered belongs to this process's optimizer, not to copies of the layer.
    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, _: dict[int, Any]) -> WriteCheck:
        return WriteCheck()
