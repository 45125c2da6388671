"""Declarations of what a backend supports, and the vocabulary of ops, dtypes and options that they are made in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

OPS = (
    "search",
    "topk_search",
    "residual_search",
    "sample",
    "quantize_forward",
    "quantize_backward",
    "residual_quantize_forward",
    "residual_quantize_backward",
    "soft_assign_forward",
    "soft_assign_backward",
    "binary_assign_forward",
    "binary_assign_backward",
    "accumulate",
    "ema_update_",
    "min_distance_",
)
"""Every op, in the order of `fastvq info`."""

METRICS = {"l2": 0, "dot": 1}
SOFT_METRICS = {"distance": 0, "l2": 1, "dot": 2}
GRADIENTS = {"ste": 0, "rotation": 1}
"""The numbers that stand for an option in an op's schema; the enumerations of csrc/cpu have the same."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WITHOUT_FLOAT64 = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Support:
    """A backend's declaration that it serves one op.

    It covers all values of the op's options: no backend serves only some of them, so there is no field for that.

    Args:
        op: the op, one of OPS.
        devices: device types on which the backend serves it; empty for every device that the backend serves at all.
        dtypes: dtypes of the call, as `call_dtype` defines them.
        composed_of: the ops of the same backend that it is made of; empty where it is one piece of code.

    Raises:
        ValueError: an op or a dtype that does not exist, an empty list of dtypes, an op composed of itself.
    """

    op: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES
    composed_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for op in (self.op, *self.composed_of):
            if op not in OPS:
                raise ValueError(f"op: must be one of {', '.join(OPS)}, got {op!r}")
        if self.op in self.composed_of:
            raise ValueError(f"composed_of: {self.op} cannot be composed of itself")
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            raise ValueError(f"dtypes: must be some of {_names(DTYPES)}, got {self.dtypes}")

    def covers(self, device: torch.device, dtype: torch.dtype) -> bool:
        return (not self.devices or device.type in self.devices) and dtype in self.dtypes


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Args:
        name: the name that `use_backend` takes.
        reasons: why the backend cannot serve a device at all; empty where it can. It may load a library.
        supports: what it serves on the devices that it can serve. One op may have several declarations.
        implementation: the function that serves an op on a type of device. Called once for each choice.

    Raises:
        ValueError: two declarations that cover the same op, device and dtype.
    """

    name: str
    reasons: Callable[[torch.device], tuple[str, ...]]
    supports: tuple[Support, ...]
    implementation: Callable[[str, str], Callable[..., Any]]

    def __post_init__(self) -> None:
        for i, one in enumerate(self.supports):
            for other in self.supports[:i]:
                anywhere = not one.devices or not other.devices or set(one.devices) & set(other.devices)
                if one.op == other.op and anywhere and set(one.dtypes) & set(other.dtypes):
                    raise ValueError(f"supports: {self.name} declares {one.op} twice for the same device and dtype")

    def support(self, op: str, device: torch.device, dtype: torch.dtype) -> Support | None:
        """Return the declaration for these inputs, or None if there is none."""
        return next((s for s in self.supports if s.op == op and s.covers(device, dtype)), None)

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str:
        """Return why the backend cannot serve these inputs, or an empty string if it can.

        It looks at the declarations first, so that an op without code loads no library.
        """
        if self.support(op, device, dtype):
            return "; ".join(self.reasons(device))
        on_device = {d: None for s in self.supports if s.op == op and s.covers(device, s.dtypes[0]) for d in s.dtypes}
        if on_device:
            return f"its {op} takes {_names(tuple(on_device))} on {device.type}, not {_names((dtype,))}"
        elsewhere = sorted({d for s in self.supports if s.op == op for d in s.devices})
        return f"it has no {op}" + (f" on {device.type}, only on {', '.join(elsewhere)}" if elsewhere else "")


def call_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype that decides who serves a call: float64 if an argument is float64, else that of the first."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return tensors[0].dtype


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
