"""Choice of the backend that serves a call.

    native     C++, on the CPU; CUDA, on NVIDIA GPUs
    triton     Triton kernels, on NVIDIA and AMD GPUs
    torch      certified search in chunked torch operations, on any device with float64
    reference  the specification; never chosen automatically

Without a request, the choice is made for each op: native serves the CPU; triton, or else native, serves a GPU; torch
serves the calls that these do not. A request, by `use_backend` or by FASTVQ_BACKEND in the environment, runs that
backend's own code or fails with the reason.

While no backend but native is requested, the native CPU kernels serve the ops without a call of this module.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastvq.errors import BackendError

from . import environment, native, triton
from .devices import without_float64
from .support import DTYPES, OPS, Backend, Support, call_dtype


def _without_float64(device: torch.device) -> tuple[str, ...]:
    return tuple(filter(None, [without_float64(device)]))


def _package(name: str) -> Callable[[str, str], Callable[..., Any]]:
    """Return the implementations of a package of this folder, which is imported when the first is asked for."""
    return lambda op, device: importlib.import_module(f".{name}", __package__).OPS[op]


_BY_OPERATIONS = tuple(
    Support(op, composed_of=("search",) if op == "residual_search" else ()) for op in OPS
)  # of the torch backend and the reference

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("native", native.reasons, native.SUPPORTS, native.implementation),
        Backend("triton", triton.reasons, triton.SUPPORTS, triton.implementation),
        Backend("torch", _without_float64, _BY_OPERATIONS, _package("torch")),
        Backend("reference", _without_float64, _BY_OPERATIONS, _package("reference")),
    )
}


def automatic(device: torch.device) -> tuple[str, ...]:
    """Return the backends that are tried without a request, in this order."""
    if device.type == "cuda":
        return ("triton", "native", "torch")
    return ("native", "torch") if device.type == "cpu" else ("triton", "torch")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class _Request:
    """A `use_backend` that has begun and not ended; requests for one backend are different objects."""

    def __init__(self, name: str) -> None:
        self.name = name


_default = environment.setting("FASTVQ_BACKEND")
_requests: list[_Request] = []
_changing = threading.RLock()
_chosen: dict[tuple[str, torch.device, torch.dtype], Callable[..., Any]] = {}


def requested() -> str | None:
    """Return the name of the backend that is requested now, or None."""
    return _requests[-1].name if _requests else _default


def refresh() -> None:
    """Drop the cached choices and decide again whether the native CPU kernels serve without this module."""
    with _changing:
        _chosen.clear()
        native.serve_directly(requested() in (None, "native"))


refresh()
for _sentence in environment.unknown_names(os.environ):
    warnings.warn(_sentence, stacklevel=2)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op by the backend `name` until the context ends.

    A request holds for the whole process: for all threads, among them those in which autograd runs a backward pass on a
    GPU. Of several requests that have not ended the one that began last is met, in whatever threads they began and in
    whatever order they end. An op that is running when a request begins or ends completes as it began.

    Args:
        name: "native", "triton", "torch" or "reference".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: at the call of an op, where the backend does not support the op, its device or its dtypes.
    """
    request = _Request(_checked(name, "name"))
    with _changing:
        _requests.append(request)
        refresh()
    try:
        yield
    finally:
        with _changing:
            _requests.remove(request)
            refresh()


def select(op: str, *tensors: torch.Tensor) -> Callable[..., Any]:
    """Return the implementation of `op` that serves these tensors now: by the device of the first and `call_dtype`.

    Raises:
        BackendError: the requested backend cannot serve them, or none can, with the reasons.
    """
    first = tensors[0]
    key = op, first.device, first.dtype if len(tensors) == 1 else call_dtype(*tensors)
    try:
        return _chosen[key]
    except KeyError:
        pass
    with _changing:
        implementation = BACKENDS[choose(*key)].implementation(op, key[1].type)
        _chosen[key] = implementation
    return implementation


def choose(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of the backend that serves an op now.

    Raises:
        BackendError: as `select`.
    """
    name = requested()
    if name is not None:
        if reason := BACKENDS[name].why_not(op, device, dtype):
            raise BackendError(f"backend {name!r} was requested for {op} but can't serve it: {reason}")
        return name
    reasons = {}
    for name in automatic(device):
        backend = BACKENDS[name]
        reason = backend.why_not(op, device, dtype)
        if not reason:
            if name == "native" and device.type == "cuda":
                _warn_once(native.UNTRIED)
            return name
        if reason.startswith("FASTVQ_"):  # a setting that cannot be met
            raise BackendError(reason)
        if device.type in ("cpu", "cuda") and backend.support(op, device, dtype):
            _warn_once(f"fastvq runs without its {name} backend, exact but slower: {reason}")
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendError(f"no backend can serve {op} on {device}: {listed}; on the CPU every op is served: x.cpu()")


_said: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=5)


def info() -> dict[str, Any]:
    """Return versions, threads, and what each backend supports on each device, as JSON-ready values.

    `devices` maps a device to the backends and the reason why one cannot serve it, or None; `ops` maps a device to the
    ops, and each to `chosen`, the backend that serves it now by dtype, and to what each backend declares.
    """
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
        "requested": requested(),
        "instruction_set": native.instruction_set() or None,
        "native_build": native.build_record(),
        "devices": {
            str(device): {name: "; ".join(backend.reasons(device)) or None for name, backend in BACKENDS.items()}
            for device in devices
        },
        "ops": {str(device): {op: _declared(op, device) for op in OPS} for device in devices},
    }


def _declared(op: str, device: torch.device) -> dict[str, Any]:
    by_backend = {}
    for name, backend in BACKENDS.items():
        served = [s for s in backend.supports if s.op == op and (not s.devices or device.type in s.devices)]
        reason = backend.why_not(op, device, served[0].dtypes[0] if served else DTYPES[0])
        by_backend[name] = {
            "supported": not reason,
            "reason": reason or None,
            "dtypes": {} if reason else {str(d)[6:]: list(s.composed_of) for s in served for d in s.dtypes},
        }
    chosen = {}
    for dtype in DTYPES:
        wanted = requested()
        names = (wanted,) if wanted else automatic(device)
        chosen[str(dtype)[6:]] = next((n for n in names if not BACKENDS[n].why_not(op, device, dtype)), None)
    return {"chosen": chosen, "backends": by_backend}


_ABBREVIATIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}


def format_info(info: dict[str, Any]) -> str:
    """Render `info()` as text."""
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
        lines += _format_ops(device, info["ops"][device])
    return "\n".join(lines)


def _format_ops(device: str, ops: dict[str, Any]) -> list[str]:
    """Render the table of ops by backends; a star marks the backend that serves float32 now."""
    rows, notes = [["", *BACKENDS]], []
    for op, declared in ops.items():
        cells = [op]
        for name, backend in declared["backends"].items():
            star = " *" if declared["chosen"]["float32"] == name else ""
            cells.append(_cell(backend["dtypes"]) + star if backend["supported"] else "-")
            note = f"  {name}: {backend['reason']}"
            if not backend["supported"] and note not in notes:
                notes.append(note)
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    explained = (
        "  own: code of its own; of ...: composed of other ops of the backend; *: serves float32 now; -: not served"
    )
    return [f"ops on {device}:", *table, explained, *notes]


def _cell(dtypes: dict[str, list[str]]) -> str:
    """Describe the dtypes that a backend serves, by its own code and composed of other ops."""
    kinds: dict[str, list[str]] = {}
    for dtype, composed_of in dtypes.items():
        kinds.setdefault("of " + ", ".join(composed_of) if composed_of else "own", []).append(_ABBREVIATIONS[dtype])
    whole = len(kinds) == 1 and len(dtypes) == len(DTYPES)
    return "; ".join(kind if whole else f"{kind} {' '.join(names)}" for kind, names in kinds.items())
