"""The package with both native libraries, in a folder of its own, and Triton's kernels in its cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq.bench.data import Shape, gaussian
from fastvq.files import write_whole

from .step import Context, said
from .times import compiled_argmin, rows_at_once, training_step

SITE = "site"
"""Folder, in that of the work, from which the steps after this one import fastvq."""
MOST_WORKERS = 8
RECORD, CUDA_LIBRARY = "native_build.json", "_native_cuda.so"

Task = Callable[[], dict[str, Any]]


def build(context: Context) -> None:
    """Copy the package and build both libraries into the copy; the source tree is only read.

    Raises:
        RuntimeError: a library could not be built; what could be is there.
    """
    package = copy_package(context.root, context.work / SITE)
    tasks: dict[str, Task] = {"CPU library": partial(_cpu, context), "CUDA library": partial(_cuda, context)}
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = {pool.submit(_timed, task): name for name, task in tasks.items()}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            _install(found, context.work, package)
            context.add(what=futures[future], **future.result())
    if failed := [name for name, result in found.items() if "error" in result]:
        raise RuntimeError(f"not built: {', '.join(failed)}")


def _install(found: dict[str, dict[str, Any]], work: Path, package: Path) -> None:
    """Put the CUDA library that was built, and the record of both, into the package.

    It is repeated when the other build ends, since setup.py removes a CUDA library and writes a record of its own.
    """
    cut = {"error": "its build had not ended"}
    cpu, cuda = (found.get(name, cut) for name in ("CPU library", "CUDA library"))
    if "error" not in cuda:
        shutil.copyfile(work / "build" / "cuda" / CUDA_LIBRARY, package / CUDA_LIBRARY)
    record: dict[str, Any]
    record, record["cuda"] = (
        {"built": "error" not in result, "reason": result.get("error"), **result} for result in (cpu, cuda)
    )
    write_whole(package / RECORD, json.dumps(record, indent=2) + "\n")


def copy_package(root: Path, site: Path) -> Path:
    """Copy fastvq and its kernels as they are installed, without what was built in the tree; return the package."""
    shutil.rmtree(site, ignore_errors=True)
    package = site / "fastvq"
    ignore = shutil.ignore_patterns("_native.*", CUDA_LIBRARY, RECORD, "__pycache__")
    shutil.copytree(root / "fastvq", package, ignore=ignore)
    shutil.copytree(root / "kernels", package / "kernels", ignore=ignore)
    return package


def _timed(task: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        found = task()
    except Exception as error:
        output = getattr(error, "stdout", None)
        found = {"error": f"{said(error)}\n{output[-2000:]}" if output else said(error)}
    return found | {"seconds": time.monotonic() - start}


def _cpu(context: Context) -> dict[str, Any]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(context.work / SITE)]
    command += ["--build-temp", str(context.work / "build" / "cpu")]
    environment = os.environ | {"FASTVQ_NATIVE": "1", "FASTVQ_CUDA": "0"}
    subprocess.run(
        command,
        cwd=context.root,
        env=environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    record = json.loads((context.work / SITE / "fastvq" / RECORD).read_text())
    return {name: record[name] for name in ("compiler", "instruction_sets")}


def _cuda(context: Context) -> dict[str, Any]:
    made = runpy.run_path(str(context.root / "csrc" / "cuda" / "build.py"))
    out = context.work / "build" / "cuda"
    chosen = _architectures(context) or (*made["ARCHITECTURES"], made["PTX"])
    return made["build"](out, Path(torch.__file__).parent, os.environ.get("CXX"), chosen)


def _architectures(context: Context) -> tuple[str, ...] | None:
    """Return the architecture of the device alone, which takes a third of the time; None for all."""
    if context.device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(context.device)
    return {(8, 0): ("sm_80",), (9, 0): ("sm_90a",), (10, 0): ("sm_100",)}.get((major, minor))


def compile_kernels(context: Context) -> None:
    """Call every op once at every size that the other steps take, in several processes, for Triton's cache."""
    sizes = context.sizes
    shapes = list(dict.fromkeys([*sizes.timed, *sizes.exact, *sizes.adversarial]))
    tasks: dict[str, Task] = {
        str(shape): partial(_call_each, str(context.device), shape, shape in sizes.timed) for shape in shapes
    }
    for name, result in in_processes(tasks, context):
        context.add(what=name, **result)


def in_processes(tasks: dict[str, Task], context: Context) -> Iterator[tuple[str, Any]]:
    """Yield the results of tasks as they end: in processes on a GPU, in this one on the CPU."""
    if context.device.type != "cuda":
        yield from ((name, _timed(task)) for name, task in tasks.items())
        return
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_timed, task): name for name, task in tasks.items()}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool as error:
                yield futures[future], {"error": said(error)}


def _call_each(device: str, shape: Shape, timed: bool) -> dict[str, Any]:
    x, codebook = (t.to(device) for t in gaussian(shape))
    calls: dict[str, Callable[[], Any]] = {
        "search": lambda: fastvq.search(x, codebook),
        "residual_search": lambda: fastvq.residual_search(x[:4096], torch.stack([codebook, codebook])),
        "accumulate": lambda: fastvq.accumulate(x, torch.arange(len(x), device=device) % shape.k, shape.k),
    }
    if timed:
        layer = fastvq.VectorQuantize(dim=shape.d, codebook_size=shape.k, decay=0.99).to(device)
        rows = x[: rows_at_once(shape.k)]
        calls["step"] = lambda: training_step(layer)(x[None].detach().requires_grad_())
        calls["compiled peer"] = lambda: compiled_argmin()(rows, codebook)
    else:
        calls["search, dot"] = lambda: fastvq.search(x, codebook, metric="dot")
        calls["search, float16"] = lambda: fastvq.search(x.half(), codebook.half())
        calls["search, bfloat16"] = lambda: fastvq.search(x.bfloat16(), codebook.bfloat16())
    errors = dict(_errors(calls.items()))
    return {"calls": len(calls)} | ({"errors": errors} if errors else {})


def _errors(calls: Iterable[tuple[str, Callable[[], Any]]]) -> Iterator[tuple[str, str]]:
    for name, call in calls:
        try:
            call()
        except Exception as error:
            yield name, said(error)
