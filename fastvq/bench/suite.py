"""The whole suite, as one JSON document from which the report is rendered."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq.backends import native

from .data import DATA, LATENT_DIMS, OTHER_SHAPES, SHAPES, Shape, clustered
from .measure import in_fresh_process, measure_search
from .peers import CONTESTANTS, NATIVE, PEERS, PRODUCT, instruction_set
from .small import ROWS, STACKS, measure_small
from .training import PEER, RESIDUAL_STEP, STAGES, STEPS, measure_step

THREADS = 2
FORCED = {
    "float32": [Shape(16384, 8192, 64), Shape(16384, 8192, 256)],
    "int16": [Shape(16384, 8192, 128), Shape(16384, 8192, 256)],
}
# Each size varied by itself around one shape.
_CENTER = Shape(16384, 1024, 64)
SCALING = {
    "N": [Shape(n, _CENTER.k, _CENTER.d) for n in (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)],
    "K": [Shape(_CENTER.n, k, _CENTER.d) for k in (16, 64, 256, 1024, 4096, 16384)],
    "D": [Shape(_CENTER.n, _CENTER.k, d) for d in (2, 4, 8, 16, 32, 64, 128, 256, 512)],
}
_COMPARED = (NATIVE, "faiss-cpu", "addmm + argmin", PRODUCT)


def run_suite(*, command: str) -> dict[str, Any]:
    """Return the document with everything that the report shows. Prints a line for each part as it begins.

    Raises:
        WrongResultError: fastvq returns a wrong index.
    """
    torch.set_num_threads(THREADS)
    document: dict[str, Any] = {"machine": machine(command), "ceilings": ceilings(THREADS)}
    document["search"] = [search_record(shape, data) for shape in SHAPES for data in kinds_of(shape)]
    document["other"] = [search_record(shape, "clustered", budget=1.5) for shape in OTHER_SHAPES]
    document["forced"] = [forced_record(tier, shape) for tier, shapes in FORCED.items() for shape in shapes]
    document["steps"] = [
        _announced(f"training step {shape}", measure_step, shape, stages)
        for shape, stages in [*((s, 0) for s in STEPS), (RESIDUAL_STEP, STAGES)]
    ]
    document["small"] = [
        record
        for stack in STACKS
        for rows in ROWS
        for record in _announced(f"small batch N={rows} {stack}", measure_small, stack, rows)
    ]
    document["memory"] = memory_records()
    document["scaling"] = {
        axis: [_announced(f"scaling {shape}", scaling_record, shape) for shape in shapes]
        for axis, shapes in SCALING.items()
    }
    document["threads"] = [_announced(f"{threads} threads", thread_record, threads) for threads in thread_counts()]
    document["ceilings"] = highest_ceilings(document)
    return document


def kinds_of(shape: Shape) -> list[str]:
    """Return the kinds of data that the suite searches at a shape: latents where a model of this dimension is trained.

    Vectors with the spectrum of latents stand beside those of the largest dimension, and those of an audio codec's
    residual stages beside latents among 1,024 codes.
    """
    kinds = ["gaussian", "clustered"]
    if shape.n > 64 and shape.d == max(LATENT_DIMS):
        kinds.append("directed")
    if shape.n > 64 and shape.d in LATENT_DIMS:
        kinds.append("latents")
    if shape == _CENTER:
        kinds += ["audio", "audio-stage-3"]
    return kinds


def highest_ceilings(document: dict[str, Any]) -> dict[str, float | None]:
    """Return the higher of the ceilings measured at the beginning and, with as many threads, at the end.

    Other load can only lower them.
    """
    threads = document["machine"]["threads"]
    found = [document["ceilings"], *(r["ceilings"] for r in document["threads"] if r["threads"] == threads)]
    return {kind: max((c[kind] for c in found if c[kind]), default=None) for kind in found[0]}


def _announced(what: str, function: Any, *arguments: Any) -> Any:
    print(f"  {what}", flush=True)
    return function(*arguments)


def search_record(shape: Shape, data: str, *, budget: float = 4.0) -> dict[str, Any]:
    """Return the record of all contestants for one shape and kind of data."""
    print(f"  search {shape} {data}", flush=True)
    x, codebook = DATA[data](shape)
    return {**shape._asdict(), "data": data, "contestants": measure_search(shape, x, codebook, budget=budget)}


def scaling_record(shape: Shape) -> dict[str, Any]:
    """Return the GFLOP/s of a few contestants on clustered data."""
    chosen = [c for c in CONTESTANTS if c.name in _COMPARED]
    records = measure_search(shape, *clustered(shape), budget=0.6, entrants=chosen)
    return {**shape._asdict(), "gflops": {r["name"]: r.get("gflops") for r in records}}


def thread_counts() -> list[int]:
    """Return 1, 2, 4 ... up to the number of processors of this machine."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= processors]


def thread_record(threads: int) -> dict[str, Any]:
    """Return the GFLOP/s of the native backend on the largest everyday shape, and the ceilings, by thread count."""
    shape = Shape(16384, 8192, 64)
    seconds = in_fresh_process(["time", NATIVE, *map(str, shape), str(threads)])
    gflops = 2e-9 * shape.n * shape.k * shape.d / seconds
    return {**shape._asdict(), "threads": threads, "gflops": gflops, "ceilings": ceilings(threads)}


def forced_record(tier: str, shape: Shape) -> dict[str, Any]:
    """Return the record of one tier alone, forced by the environment of a fresh process."""
    print(f"  {tier} alone {shape}", flush=True)
    record: dict[str, Any] = {"tier": tier, **shape._asdict()}
    try:
        arguments = ["tier", tier, *map(str, shape), str(THREADS)]
        found = in_fresh_process(arguments, dict(os.environ) | {"FASTVQ_TIER": tier})
    except RuntimeError as error:
        return record | {"not_run": str(error).strip().splitlines()[-1]}
    return record | found | {"gflops": 2e-9 * shape.n * shape.k * shape.d / found["seconds"]}


def memory_records() -> list[dict[str, Any]]:
    """Return the extra memory of a search and of a training step at every shape, each measured in a fresh process."""
    cpu = torch.device("cpu")
    cases = [("search", c.name, {s: c.why_not(s, torch.float32, cpu) for s in SHAPES}) for c in CONTESTANTS]
    cases += [("step", name, dict.fromkeys(STEPS, "")) for name in ("fastvq", PEER)]
    records: list[dict[str, Any]] = []
    for what, name, reasons in cases:
        print(f"  memory of {what} by {name}", flush=True)
        sizes = [str(size) for shape, reason in reasons.items() if not reason for size in shape]
        try:
            found = iter(in_fresh_process([f"{what}-memory", name, str(THREADS), *sizes]))
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            reasons = {shape: reason or last for shape, reason in reasons.items()}
        for shape, reason in reasons.items():
            record = {"what": what, "name": name, **shape._asdict()}
            taken = None if reason else next(found)
            records.append(record | ({"not_run": reason or "it failed"} if taken is None else {"bytes": taken}))
    return records


def ceilings(threads: int) -> dict[str, float | None]:
    """Return GFLOP/s of multiply-adds by type and GB/s of reading; None without such an instruction."""
    if native.reasons(torch.device("cpu")):
        return dict.fromkeys(("float32", "bfloat16", "int16", "read"))
    return {kind: native.peak(kind, threads) for kind in ("float32", "bfloat16", "int16", "read")}


def machine(command: str) -> dict[str, Any]:
    """Return the versions, hardware and settings that the figures depend on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "fastvq": fastvq.__version__,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "peers": PEERS,
    }


_PACKAGES = ("torch", "numpy", "faiss-cpu", "scikit-learn", "vector-quantize-pytorch", "transformers")


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    model = named.get("model name", platform.machine())
    return f"{model} (family {named.get('cpu family', '?')}, model {named.get('model', '?')})"


def commit() -> str | None:
    """Return the commit of fastvq's working tree, with a + if it has changes; None outside a repository."""
    folder = Path(fastvq.__file__).parent
    try:
        described = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*"]
        return subprocess.run(described, check=True, text=True, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
