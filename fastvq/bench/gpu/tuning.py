"""Other launch configurations of the Triton scan, and other kernels of the CUDA library, beside those in use."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvq
from fastvq.bench.data import Shape, clustered
from fastvq.bench.exact import nearest

from .build import Task, in_processes
from .run import python
from .step import Context
from .times import compare, rotated, served, vectors

TABLE = "the table's"
PATHS = ("automatic", "few", "cores", "matrix", "three_products")
"""Values of FASTVQ_CUDA_PATH that are timed; `define` is for tests."""
CORES_DIM, FEW_ROWS = 16, 4096
"""Largest dimension of `cores`, and largest number of rows of `few`."""


def autotune(context: Context) -> None:
    """Time a search by each candidate configuration of its first scan, and say what FASTVQ_AUTOTUNE would choose."""
    shapes = [shape for shape in context.sizes.timed if shape.n * shape.k * shape.d <= context.sizes.slowest]
    count = max(len(configurations(context.device, shape)) for shape in shapes)
    tasks: dict[str, Task] = {
        f"{place} of {shape}": functools.partial(_call_by, str(context.device), shape, place)
        for place in range(1, count)
        for shape in shapes
    }
    for _ in in_processes(tasks, context):
        if context.left() <= 0:
            break
    for shape in shapes:
        context.case(functools.partial(_candidates, context, shape), what="candidates", **shape._asdict())
    for shape in shapes[:1]:
        context.case(functools.partial(_chosen, context, shape), what="FASTVQ_AUTOTUNE=1", **shape._asdict())


def configurations(device: torch.device, shape: Shape) -> dict[str, Any]:
    """Return the candidates for the first scan of a shape, the table's first."""
    from fastvq.kernels import frame, launch

    default = launch.scan(device, frame.columns_of(shape.d), 1)
    return {
        (TABLE if config == default else ", ".join(_changes(default, config))): config
        for config in launch.candidates(default)
    }


def _changes(default: Any, config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) != getattr(default, field.name):
            yield f"{field.name} {value}"


@contextlib.contextmanager
def in_the_table(device: torch.device, shape: Shape, config: Any) -> Iterator[None]:
    """Put a configuration into the table, for the first scan of a shape, until the context ends."""
    from fastvq.kernels import frame, launch

    table, columns = launch.SCANS[launch.architecture(device)], frame.columns_of(shape.d)
    key = next(key for key in table if key[0] == 1 and columns <= key[1])
    before = table[key]
    table[key] = config
    try:
        yield
    finally:
        table[key] = before


def _search_by(shape: Shape, config: Any, codebook: Tensor, x: Tensor) -> Tensor:
    with in_the_table(x.device, shape, config):
        return fastvq.search(x, codebook)


def _call_by(device: str, shape: Shape, place: int) -> dict[str, Any]:
    found = list(configurations(torch.device(device), shape).values())
    if place < len(found):
        x, codebook = (t.to(device) for t in clustered(shape))
        with fastvq.use_backend("triton"):
            _search_by(shape, found[place], codebook, x)
    return {}


def _candidates(context: Context, shape: Shape) -> dict[str, Any]:
    x, codebook = vectors(context, shape, "clustered")
    factories: dict[str, Callable[[], Any] | str] = {
        name: served("triton", "search", context, functools.partial(_search_by, shape, config, codebook))
        for name, config in configurations(context.device, shape).items()
    }
    return compare(context, shape, factories, [(part,) for part in rotated(x)], _different(nearest(x, codebook)))


def _chosen(context: Context, shape: Shape) -> dict[str, Any]:
    """Search in a process with FASTVQ_AUTOTUNE=1, as a user sets it, and return the file that keeps the choice."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            python("-m", "fastvq.bench.gpu.tuning", str(context.device), *map(str, shape)),
            env=os.environ | {"FASTVQ_AUTOTUNE": "1", "XDG_CACHE_HOME": folder},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"the search ended with {done.returncode}: {done.stdout[-500:]}")
        kept = next(Path(folder).rglob("launch.json"), None)
        return {
            "wrong": int(done.stdout.split()[-1]),
            "kept": kept.read_text() if kept else "nothing: the CPU is not tuned",
        }


def main(device: str, *sizes: str) -> None:
    """Search by Triton and print the number of wrong indices."""
    x, codebook = (t.to(device) for t in clustered(Shape(*map(int, sizes))))
    with fastvq.use_backend("triton"):
        found = fastvq.search(x, codebook)
    print(_different(nearest(x, codebook))(found))


def cuda_paths(context: Context) -> None:
    """Time a search by each of the kernels that FASTVQ_CUDA_PATH names and that can serve it."""
    for shape in (*context.sizes.timed, *context.sizes.few):
        if shape.n * shape.k * shape.d <= context.sizes.slowest:
            context.case(functools.partial(_paths, context, shape), what="paths", **shape._asdict())


def _paths(context: Context, shape: Shape) -> dict[str, Any]:
    x, codebook = vectors(context, shape, "clustered")
    factories: dict[str, Callable[[], Any] | str] = {}
    for path in PATHS:
        if (path == "cores" and shape.d > CORES_DIM) or (path == "few" and shape.n > FEW_ROWS):
            continue
        factories[path] = served("native", "search", context, functools.partial(_search_on, path, codebook))
    return compare(context, shape, factories, [(part,) for part in rotated(x)], _different(nearest(x, codebook)))


def _search_on(path: str, codebook: Tensor, x: Tensor) -> Tensor:
    with setting("FASTVQ_CUDA_PATH", path):
        return fastvq.search(x, codebook)


def _different(expected: Tensor) -> Callable[[Tensor], int]:
    return lambda found: int((found != expected).sum())


@contextlib.contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment until the context ends."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


if __name__ == "__main__":
    main(*sys.argv[1:])
