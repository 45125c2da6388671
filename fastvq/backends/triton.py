"""The triton backend: which ops the Triton kernels of `fastvq.kernels` serve, and on which devices.

Importing this module imports neither Triton nor the kernels. With TRITON_INTERPRET=1 in the environment from the start
the kernels run on the CPU in Triton's interpreter, slowly: this is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from .support import WITHOUT_FLOAT64, Support

CAPABILITY = (8, 0)
"""The least compute capability: float16 matrix units that sum in float32, and asynchronous copies."""

AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""Prefixes of the AMD architectures that have matrix units."""

_MODULES = {
    "search": "search",
    "residual_search": "residual_search",
    "quantize_forward": "quantize",
    "quantize_backward": "quantize",
    "residual_quantize_forward": "residual_quantize",
    "residual_quantize_backward": "residual_quantize",
    "accumulate": "accumulate",
    "ema_update_": "ema_update",
}
"""The module of `fastvq.kernels` that has an op."""

SUPPORTS = (
    *(Support(op, dtypes=WITHOUT_FLOAT64 if op == "residual_search" else Support(op).dtypes) for op in _MODULES),
    Support("residual_search", dtypes=(torch.float64,), composed_of=("search",)),
)


@functools.cache
def _missing() -> str:
    """Return why Triton cannot be imported, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed (torch's CUDA and ROCm builds bring it)"
    return ""


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons(device: torch.device) -> tuple[str, ...]:
    """Return why the kernels cannot run on a device; empty where they can."""
    found = []
    if device.type == "cpu" and not interpreted():
        found.append("Triton kernels run on GPUs; on cpu only in the interpreter, with TRITON_INTERPRET=1")
    elif device.type not in ("cpu", "cuda"):
        found.append(f"the Triton kernels of this release run on cuda (NVIDIA, AMD), not on {device.type}")
    elif device.type == "cuda":
        found += [reason] if (reason := _unfit_gpu(device)) else []
    return (*found, *filter(None, [_missing()]))


def _unfit_gpu(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "no cuda device is available"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        fits = name.startswith(AMD)
        return "" if fits else f"needs an AMD GPU with matrix units ({', '.join(AMD)}), this is a {name}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        least, found = (".".join(map(str, numbers)) for numbers in (CAPABILITY, capability))
        return f"needs compute capability {least}, this device has {found}"
    return ""


def implementation(op: str, device: str) -> Callable[..., Any]:
    """Return the function of `fastvq.kernels` that runs an op."""
    return getattr(importlib.import_module(f"fastvq.kernels.{_MODULES[op]}"), op)
