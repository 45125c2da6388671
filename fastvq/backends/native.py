"""The native backend: loads the compiled libraries and calls the ops that they implement.

On the CPU these are all but those that `OPS` takes from the torch backend. On NVIDIA GPUs there are CUDA kernels for
the searches, `accumulate`, `ema_update_` and `min_distance_`; torch operations serve the rest.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.ops.registry import GRADIENTS, METRICS, SOFT_METRICS

from . import Ops
from . import torch as eager
from .arithmetic import compute_dtype

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
"""What the CPU library must have: one that is older than this module may lack some."""
CUDA_KERNELS = ("search", "residual_search", "accumulate", "ema_update_", "min_distance_")
"""The same of the CUDA library."""
_REBUILD = (
    "install a C++17 compiler (Debian: apt install g++), then fastvq again: pip install --force-reinstall --no-deps"
)


@functools.cache
def build_record() -> dict[str, Any]:
    """What setup.py wrote about the build: whether there is a library, by which compiler, or why not."""
    path = _PACKAGE / "native_build.json"
    if not path.exists():
        return {"built": False, "reason": "the package was not installed by pip"}
    return json.loads(path.read_text())


@functools.cache
def _load() -> tuple[str, str]:
    """(instruction set, "") after loading the library, or ("", why it can't be used)."""
    record = build_record()
    if not record["built"]:
        return "", f"not built: {record['reason']}. To have it, {_REBUILD}"
    path = _PACKAGE / "_native.so"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return "", f"{path} doesn't load: {error}"
    if other := _other_version(path, KERNELS, "CPU"):
        return "", f"{other}. Build it again: {_REBUILD}"
    library.fastvq_native_isa.restype = ctypes.c_char_p
    error_text = ctypes.c_char_p()
    isa = library.fastvq_native_isa(ctypes.byref(error_text))
    return (isa.decode(), "") if isa else ("", (error_text.value or b"").decode())


def instruction_set() -> str:
    """The instruction set in use, or "" where the backend is unavailable."""
    return _load()[0]


def peak(kind: str, threads: int) -> float | None:
    """What this machine can do at most with `threads` threads, measured: "float32", "bfloat16" or "int16" multiply-adds
    in GFLOP/s (a multiply-add is two operations), "read" memory in GB/s. None where it has no such instruction."""
    library = ctypes.CDLL(str(_PACKAGE / "_native.so"))
    library.fastvq_native_peak.restype = ctypes.c_double
    rate = library.fastvq_native_peak(kind.encode(), threads)
    return rate if rate > 0 else None


CAPABILITY = (8, 0)
"""The least that an NVIDIA GPU must have: float16 matrix units that sum in float32, and asynchronous copies."""

UNTRIED = (
    "fastvq's CUDA kernels serve this device. They have been compiled, and run in an emulator, but not on a GPU yet "
    "(docs/gpu.md); FASTVQ_BACKEND=torch leaves them out"
)


@functools.cache
def _load_cuda() -> str:
    """Loads the CUDA library; why it can't be used, else empty."""
    record = build_record().get("cuda", {"built": False, "reason": "the package was built without it"})
    if not record["built"]:
        return f"no CUDA kernels were built: {record['reason']}. FASTVQ_CUDA=1 pip install builds them, by nvcc"
    path = _PACKAGE / "_native_cuda.so"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} doesn't load: {error}"
    if other := _other_version(path, CUDA_KERNELS, "CUDA"):
        return f"{other}. FASTVQ_CUDA=1 pip install builds it again"
    library.fastvq_cuda_unfit.restype = ctypes.c_char_p
    if unfit := library.fastvq_cuda_unfit().decode():
        return f"the CUDA kernels can't run: {unfit}"
    return ""


def _other_version(path: Path, kernels: tuple[str, ...], key: str) -> str:
    """What a library that was loaded lacks of what this module calls; empty if nothing."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in kernels if not has(f"fastvq::native_{name}", key)]
    return f"{path} is of another version, without {', '.join(missing)}" if missing else ""


def _unavailable_on_cuda(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "the CUDA kernels run on NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "no cuda device is available"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        least, found = (".".join(map(str, numbers)) for numbers in (CAPABILITY, capability))
        return f"needs compute capability {least}, this device has {found}"
    return _load_cuda()


def unavailable(device: torch.device) -> str:
    """Why this backend can't serve `device`; empty where it can."""
    if device.type == "cuda":
        return _unavailable_on_cuda(device)
    if device.type != "cpu":
        return f"the native kernels of this release run on cpu and cuda, not on {device.type}"
    return _load()[1]


def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    return torch.ops.fastvq.native_search(x, codebook, metric=METRICS.index(metric))


def residual_search(x: Tensor, codebooks: Tensor) -> Tensor:
    return torch.ops.fastvq.native_residual_search(x, codebooks)


def topk_search(x: Tensor, codebook: Tensor, k: int, *, metric: str = "l2") -> Tensor:
    return torch.ops.fastvq.native_topk_search(x, codebook, k, metric=METRICS.index(metric))


def sample(x: Tensor, codebook: Tensor, *, temperature: float, seed: Tensor, metric: str = "l2") -> Tensor:
    return torch.ops.fastvq.native_sample(x, codebook, temperature=temperature, seed=seed, metric=METRICS.index(metric))


def soft_assign_forward(
    x: Tensor, codebook: Tensor, mask: Tensor | None, *, metric: str, **options: Any
) -> tuple[Tensor, ...]:
    if compute_dtype(x, codebook) == torch.float64:  # kernels are in float32
        return eager.soft_assign.soft_assign_forward(x, codebook, mask, metric=metric, **options)
    return torch.ops.fastvq.native_soft_assign_forward(x, codebook, mask, metric=SOFT_METRICS.index(metric), **options)


def soft_assign_backward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor,
    *grads: Tensor | None,
    metric: str,
    **options: Any,
) -> tuple[Tensor, ...]:
    if compute_dtype(x, codebook) == torch.float64:
        return eager.soft_assign.soft_assign_backward(x, codebook, mask, logsumexp, *grads, metric=metric, **options)
    tensors = (x, codebook, mask, logsumexp, *grads)
    return torch.ops.fastvq.native_soft_assign_backward(*tensors, metric=SOFT_METRICS.index(metric), **options)


def quantize_backward(*tensors: Tensor, gradient: str, **options: Any) -> Tensor:
    return torch.ops.fastvq.native_quantize_backward(*tensors, gradient=GRADIENTS.index(gradient), **options)


def residual_quantize_backward(*tensors: Tensor, gradient: str, **options: Any) -> Tensor:
    return torch.ops.fastvq.native_residual_quantize_backward(*tensors, gradient=GRADIENTS.index(gradient), **options)


def quantize_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastvq.native_quantize_forward(*arguments)


def residual_quantize_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastvq.native_residual_quantize_forward(*arguments)


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    return torch.ops.fastvq.native_accumulate(x, indices, codebook_size)


def ema_update_(*tensors: Tensor, **options: Any) -> None:
    torch.ops.fastvq.native_ema_update_(*tensors, **options)


def min_distance_(distances: Tensor, x: Tensor, codes: Tensor) -> None:
    torch.ops.fastvq.native_min_distance_(distances, x, codes)


def _on_cpu(kernel: Callable[..., Any], operations: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel on the CPU; torch operations on a device that has none."""

    def call(x: Tensor, *arguments: Any, **options: Any) -> Any:
        return (kernel if x.device.type == "cpu" else operations)(x, *arguments, **options)

    return call


OPS: Ops = {
    "search": search,
    "residual_search": residual_search,
    "topk_search": _on_cpu(topk_search, eager.OPS["topk_search"]),
    "quantize_forward": _on_cpu(quantize_forward, eager.OPS["quantize_forward"]),
    "quantize_backward": _on_cpu(quantize_backward, eager.OPS["quantize_backward"]),
    "residual_quantize_forward": _on_cpu(residual_quantize_forward, eager.OPS["residual_quantize_forward"]),
    "residual_quantize_backward": _on_cpu(residual_quantize_backward, eager.OPS["residual_quantize_backward"]),
    "accumulate": accumulate,
    "ema_update_": ema_update_,
    "min_distance_": min_distance_,
    "binary_assign_forward": eager.binary_assign.binary_assign_forward,
    "binary_assign_backward": eager.binary_assign.binary_assign_backward,
    "soft_assign_forward": _on_cpu(soft_assign_forward, eager.OPS["soft_assign_forward"]),
    "soft_assign_backward": _on_cpu(soft_assign_backward, eager.OPS["soft_assign_backward"]),
    "sample": _on_cpu(sample, eager.OPS["sample"]),
}
