"""The native backend: C++ kernels on the CPU, CUDA kernels on NVIDIA GPUs.

A library is loaded when one of its kernels is first asked for.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .arithmetic import joined
from .support import GRADIENTS, METRICS, SOFT_METRICS, WITHOUT_FLOAT64, Support

_PACKAGE = Path(__file__).parent.parent
KERNELS = (
    "search",
    "residual_search",
    "topk_search",
    "sample",
    "soft_assign_forward",
    "soft_assign_backward",
    "quantize_forward",
    "quantize_backward",
    "residual_quantize_forward",
    "residual_quantize_backward",
    "accumulate",
    "ema_update_",
    "min_distance_",
)
"""The kernels of the CPU library; a library older than this module may lack some."""
PACKED = ("pack", "packed_search", "packed_topk_search", "packed_residual_search")
"""The ops of the CPU library on codebooks that a caller keeps packed."""
CUDA_KERNELS = ("search", "residual_search", "accumulate", "ema_update_", "min_distance_")
"""The kernels of the CUDA library."""

SUPPORTS = (
    *(
        Support(
            op,
            devices=("cpu", "cuda") if op in CUDA_KERNELS else ("cpu",),
            dtypes=WITHOUT_FLOAT64 if op.startswith("soft_assign") else Support(op).dtypes,
        )
        for op in KERNELS
    ),
)
_REBUILD = "install fastvq again, in its clone: pip install --force-reinstall --no-deps ."


@functools.cache
def build_record() -> dict[str, Any]:
    """Return the record of setup.py: whether there is a library, by which compiler, or why not."""
    path = _PACKAGE / "native_build.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"built": False, "reason": "the package was not installed by pip"}
    except (OSError, ValueError, RecursionError) as error:
        return {"built": False, "reason": f"{path} cannot be read: {error}"}
    if not (isinstance(record, dict) and isinstance(record.get("built"), bool)):
        return {"built": False, "reason": f"{path} is no record of a build"}
    return record


@functools.cache
def _load() -> tuple[str, str]:
    """Load the CPU library and return its instruction set and "", or "" and why it cannot be used."""
    record = build_record()
    if not record["built"]:
        remedy = f"{record['remedy']}, then " if record.get("remedy") else ""
        return "", f"not built: {record.get('reason', 'no reason was recorded')}. To have it, {remedy}{_REBUILD}"
    path = _PACKAGE / "_native.so"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return "", f"{path} doesn't load: {error}"
    if other := _other_version(path, (*(f"native_{name}" for name in KERNELS), *PACKED), "CPU"):
        return "", f"{other}: {_REBUILD}"
    library.fastvq_native_isa.restype = ctypes.c_char_p
    error_text = ctypes.c_char_p()
    isa = library.fastvq_native_isa(ctypes.byref(error_text))
    if not isa:
        return "", (error_text.value or b"").decode()
    _serving.library = library
    library.fastvq_native_serve(_serving.wanted)
    return isa.decode(), ""


class _Serving:
    """The CPU library, once it is loaded, and whether its kernels are to serve the ops directly."""

    library: ctypes.CDLL | None = None
    wanted = False


_serving = _Serving()


def serve_directly(yes: bool) -> None:
    """Let the CPU kernels serve the ops by themselves, or hand each call to the choice of a backend in Python.

    It loads nothing: a library that is loaded later follows the last call.
    """
    _serving.wanted = yes
    if _serving.library is not None:
        _serving.library.fastvq_native_serve(yes and not _load()[1])


def free_packed(number: int) -> None:
    """Free a packed codebook of the CPU library once no search uses it."""
    if _serving.library is not None:
        _serving.library.fastvq_native_free_packed(ctypes.c_int64(number))


def instruction_set() -> str:
    """Return the instruction set in use, or "" where the CPU library cannot be used."""
    return _load()[0]


def peak(kind: str, threads: int) -> float | None:
    """Measure the peak rate of this machine with `threads` threads.

    Args:
        kind: "float32", "bfloat16" or "int16" multiply-adds, in GFLOP/s (a multiply-add is two operations), or "read",
            in GB/s of memory.
        threads: the number of threads.

    Returns:
        The rate, or None where the processor has no such instruction.
    """
    library = ctypes.CDLL(str(_PACKAGE / "_native.so"))
    library.fastvq_native_peak.restype = ctypes.c_double
    rate = library.fastvq_native_peak(kind.encode(), threads)
    return rate if rate > 0 else None


CAPABILITY = (8, 0)
"""The least compute capability: float16 matrix units that sum in float32, and asynchronous copies."""

UNTRIED = (
    "fastvq's CUDA kernels serve this device. They have been compiled, and run in an emulator, but not on a GPU yet "
    "(docs/gpu.md); FASTVQ_BACKEND=torch leaves them out"
)


@functools.cache
def _load_cuda() -> str:
    """Load the CUDA library and return why it cannot be used, or an empty string."""
    record = build_record().get("cuda", {"built": False, "reason": "the package was built without it"})
    if not record["built"]:
        return (
            f"no CUDA kernels were built: {record['reason']}. To build them, by nvcc, set FASTVQ_CUDA=1 and {_REBUILD}"
        )
    path = _PACKAGE / "_native_cuda.so"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} doesn't load: {error}"
    if other := _other_version(path, tuple(f"native_{name}" for name in CUDA_KERNELS), "CUDA"):
        return f"{other}: set FASTVQ_CUDA=1 and {_REBUILD}"
    library.fastvq_cuda_unfit.restype = ctypes.c_char_p
    if unfit := library.fastvq_cuda_unfit().decode():
        return f"the CUDA kernels can't run: {unfit}"
    return ""


def _other_version(path: Path, ops: tuple[str, ...], key: str) -> str:
    """Return which ops a loaded library lacks, or an empty string."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name.removeprefix("native_") for name in ops if not has(f"fastvq::{name}", key)]
    return f"{path} is of another version, without {', '.join(missing)}" if missing else ""


def _unfit_gpu(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "the CUDA kernels run on NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "no cuda device is available"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        least, found = (".".join(map(str, numbers)) for numbers in (CAPABILITY, capability))
        return f"needs compute capability {least}, this device has {found}"
    return ""


def reasons(device: torch.device) -> tuple[str, ...]:
    """Return why the kernels cannot run on a device; empty where they can."""
    if device.type == "cuda":
        reason = _unfit_gpu(device) or _load_cuda()
    elif device.type == "cpu":
        reason = _load()[1]
    else:
        reason = f"the native kernels of this release run on cpu and cuda, not on {device.type}"
    return (reason,) if reason else ()


def implementation(op: str, device: str) -> Callable[..., Any]:
    """Return the function that calls the kernel of an op; like every implementation it takes options by name."""
    kernel = getattr(torch.ops.fastvq, f"native_{op}").default
    numbers = {
        "soft_assign": SOFT_METRICS,
        "search": METRICS,
        "residual_search": METRICS,
        "topk_search": METRICS,
        "sample": METRICS,
    }.get(op.removesuffix("_forward").removesuffix("_backward"))
    if op in ("quantize_backward", "residual_quantize_backward"):
        return lambda *tensors, gradient, **options: kernel(*tensors, gradient=GRADIENTS[gradient], **options)
    if op == "residual_search" and device == "cuda":
        return functools.partial(_search_stack_on_cuda, kernel)
    if numbers is None:
        return kernel
    return lambda *arguments, metric="l2", **options: kernel(*arguments, metric=numbers[metric], **options)


def _search_stack_on_cuda(
    kernel: Callable[..., Any], x: torch.Tensor, codebooks: Sequence[torch.Tensor], *, metric: str = "l2"
) -> torch.Tensor:
    """Search stages of one size by their distance in one launch; others, and metric "dot", by one search a stage."""
    stack = joined(codebooks)
    if metric != "l2" or stack is None:
        from .torch.residual_search import search_stages

        return search_stages(implementation("search", "cuda"), x, codebooks, metric=metric)
    found: torch.Tensor = kernel(x, [stack])
    return found
