"""The device, what it can do at most, and the versions of everything that a figure depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
from functools import partial
from typing import Any

import torch

from fastvq.bench.measure import seconds_of
from fastvq.bench.suite import commit, processor

from .step import Context
from .times import at_precision

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "cupy-cuda13x", "transformers", "setuptools")
QUERY = (
    "name,driver_version,vbios_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total,utilization.gpu,clocks_event_reasons.active"
)
_DTYPES = (
    ("float32", torch.float32, "highest"),
    ("tf32", torch.float32, "high"),
    ("float16", torch.float16, "highest"),
    ("bfloat16", torch.bfloat16, "highest"),
    ("float64", torch.float64, "highest"),
)


def describe(context: Context) -> None:
    """Record the versions, the device, its clocks at rest and under load, and its rates."""
    context.case(versions, what="versions")
    context.case(partial(properties, context.device), what="device")
    context.case(clocks, what="clocks at rest")
    for name, dtype, precision in _DTYPES:
        measure = at_precision(precision, partial(product_rate, context, dtype))
        context.case(measure, what=f"product of {name} matrices")
    context.case(partial(copy_rate, context), what="copy")
    context.case(clocks, what="clocks under load")


def versions() -> dict[str, Any]:
    """Return the versions of the software."""
    found = {"python": platform.python_version(), "system": platform.platform(), "torch's CUDA": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    nvcc = shutil.which("nvcc")
    found["nvcc"] = _output(nvcc, "--version").splitlines()[-2] if nvcc else None
    return {"versions": found, "commit": commit(), "processor": processor(), "cores": os.cpu_count()}


def properties(device: torch.device) -> dict[str, Any]:
    """Return what the driver says of the device."""
    if device.type != "cuda":
        return {"name": processor(), "capability": None}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "units": found.multi_processor_count,
        "memory": found.total_memory,
        "cache": found.L2_cache_size,
    }


def clocks() -> dict[str, Any]:
    """Return clocks, power and temperature by nvidia-smi, which only reads them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"not_run": "no nvidia-smi"}
    values = _output(program, f"--query-gpu={QUERY}", "--format=csv,noheader").splitlines()[0].split(", ")
    return dict(zip(QUERY.split(","), values, strict=True))


def _output(*command: str) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stdout[-500:]}")
    return done.stdout


def product_rate(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    """Return the operations a second of a product of random matrices: zeros are faster."""
    side = context.sizes.matrix // (4 if dtype == torch.float64 else 1)
    left, right = (torch.randn(side, side, device=context.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = _median(partial(torch.mm, left, right, out=out), context.device)
    return {"tflops": 2e-12 * side**3 / seconds, "side": side}


def copy_rate(context: Context) -> dict[str, Any]:
    """Return the bytes a second, read and written, of a copy many times the cache."""
    source = torch.randn(context.sizes.matrix, 4 * context.sizes.matrix, device=context.device)
    copy = torch.empty_like(source)
    seconds = _median(partial(copy.copy_, source), context.device)
    return {"terabytes": 2e-12 * source.numel() * 4 / seconds, "bytes": source.numel() * 4}


def _median(call: Any, device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(seconds_of(call, device) for _ in range(7))
