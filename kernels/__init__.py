"""The triton backend: the ops as Triton kernels, for NVIDIA and AMD GPUs.

Importing this imports no triton: that happens at the first call. With TRITON_INTERPRET=1 in the environment from the
start the kernels run on the CPU in Triton's interpreter, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

CAPABILITY = (8, 0)
"""The least that an NVIDIA GPU must have: float16 matrix units that sum in float32, and asynchronous copies."""

AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD GPUs with matrix units begin like that."""


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed (torch's CUDA and ROCm builds bring it)"
    return ""


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str:
    """Why this backend can't serve `device`; empty where it can."""
    if device.type == "cpu":
        if not interpreted():
            return "Triton kernels run on GPUs; on cpu only in the interpreter, with TRITON_INTERPRET=1"
        return _missing()
    if device.type != "cuda":
        return f"the Triton kernels of this release run on cuda (NVIDIA, AMD), not on {device.type}"
    if not torch.cuda.is_available():
        return "no cuda device is available"
    if _missing():
        return _missing()
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return (
            "" if name.startswith(AMD) else f"needs an AMD GPU with matrix units ({', '.join(AMD)}), this is a {name}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return (
            f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, this device has {capability[0]}.{capability[1]}"
        )
    return ""


def _late(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f".{module}", __name__), name)(*args, **kwargs)

    return call


def _torch(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("fastvq.backends.torch").OPS[name](*args, **kwargs)

    return call


WITHOUT_KERNEL = (
    "topk_search",
    "binary_assign_forward",
    "binary_assign_backward",
    "soft_assign_forward",
    "soft_assign_backward",
    "sample",
    "min_distance_",
)
"""Ops that the torch backend serves here too."""

OPS: dict[str, Callable[..., Any]] = {
    "search": _late("search", "search"),
    "residual_search": _late("residual_search", "residual_search"),
    "quantize_forward": _late("quantize", "quantize_forward"),
    "quantize_backward": _late("quantize", "quantize_backward"),
    "residual_quantize_forward": _late("quantize", "residual_quantize_forward"),
    "residual_quantize_backward": _late("quantize", "residual_quantize_backward"),
    "accumulate": _late("accumulate", "accumulate"),
    "ema_update_": _late("ema_update", "ema_update_"),
    **{name: _torch(name) for name in WITHOUT_KERNEL},
}
