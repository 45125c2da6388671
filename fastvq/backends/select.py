"""Which backend serves a call, and why not the others.

    native     C++, on the CPU; CUDA, on NVIDIA GPUs
    triton     Triton kernels, on NVIDIA and AMD GPUs
    torch      certified search in chunked torch operations, on any device with float64
    reference  the specification; never chosen by itself

By itself, native serves the CPU, and a GPU triton, else native, where it is NVIDIA's, and torch what they can't. A
request, by `use_backend` or by FASTVQ_BACKEND in the environment, is met or fails with the reason: it never falls back.
"""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import fastvq.kernels as kernels

from . import Ops, native, reference
from . import torch as eager


@dataclass(frozen=True)
class Backend:
    """One implementation of all ops. `unavailable(device)` is the reason why it can't serve a device, else empty."""

    name: str
    ops: Ops
    unavailable: Callable[[torch.device], str]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("native", native.OPS, native.unavailable),
        Backend("triton", kernels.OPS, kernels.unavailable),
        Backend("torch", eager.OPS, eager.unavailable),
        Backend("reference", reference.OPS, eager.unavailable),
    )
}


def automatic(device: torch.device) -> tuple[str, ...]:
    """The backends that are tried where none was requested, in this order."""
    if device.type == "cuda":
        return ("triton", "native", "torch")
    return ("native", "torch") if device.type == "cpu" else ("triton", "torch")


_requested: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


if os.environ.get("FASTVQ_BACKEND"):
    _requested = _checked(os.environ["FASTVQ_BACKEND"], "FASTVQ_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op by the backend `name`, in all threads, until the context ends.

    Args:
        name: "native", "triton", "torch" or "reference".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: at the call of an op, where the backend can't serve the device of its tensors.
    """
    global _requested
    previous, _requested = _requested, _checked(name, "name")
    try:
        yield
    finally:
        _requested = previous


def select(op: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of `op` that serves `device` now."""
    if _requested is not None:
        backend = BACKENDS[_requested]
        if reason := backend.unavailable(device):
            raise RuntimeError(f"backend {backend.name!r} was requested for {op} but can't serve it: {reason}")
        return backend.ops[op]
    for name in automatic(device):
        backend = BACKENDS[name]
        if not (reason := backend.unavailable(device)):
            if name == "native" and device.type == "cuda":
                _warn_once(native.UNTRIED)
            return backend.ops[op]
        if reason.startswith("FASTVQ_ISA"):  # a choice that can't be met
            raise RuntimeError(reason)
        if device.type in ("cpu", "cuda"):
            _say_once(name, reason)
    reasons = "; ".join(f"{name}: {BACKENDS[name].unavailable(device)}" for name in automatic(device))
    raise RuntimeError(f"no backend can serve {op} on {device}: {reasons}")


_said: set[str] = set()


def _say_once(name: str, reason: str) -> None:
    _warn_once(f"fastvq runs without its {name} backend, exact but slower: {reason}")


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


def info() -> dict[str, Any]:
    """Backends with the reason why one is unavailable, instruction set, threads and versions, as JSON-ready values."""
    from fastvq import __version__

    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator() or devices[0])
    return {
        "fastvq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "requested": _requested,
        "instruction_set": native.instruction_set() or None,
        "native_build": native.build_record(),
        "devices": {
            str(device): {name: backend.unavailable(device) or None for name, backend in BACKENDS.items()}
            for device in devices
        },
    }


def format_info(info: dict[str, Any]) -> str:
    """`info()` for a person."""
    lines = [f"{name:10} {info[name]}" for name in ("fastvq", "torch", "python", "machine", "threads")]
    lines.append(f"{'cpu code':10} {info['instruction_set'] or 'none'}")
    if info["native_build"]["built"]:
        lines.append(f"{'built by':10} {info['native_build']['compiler']}")
    for device, reasons in info["devices"].items():
        chosen = info["requested"] or next((n for n in automatic(torch.device(device)) if reasons[n] is None), None)
        how = "requested" if info["requested"] else "chosen automatically"
        lines.append(f"backends on {device}:")
        for name, reason in reasons.items():
            note = reason or ("available" + (f", {how}" if name == chosen else ""))
            lines.append(f"  {name:10} {note}")
    return "\n".join(lines)
