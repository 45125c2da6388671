"""Interleaved timing, checked results, and memory as the operating system sees it."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.backends import reference
from fastvq.errors import WrongResultError

from .data import DATA, Shape
from .peers import CONTESTANTS, Contestant, contestants

CHECKED_ROWS = 256
_CHECKED_ELEMENTS = 1 << 28
# Another library's threads spin for a while after their work; the next contestant must not share the cores with them.
_SETTLE_SECONDS = 0.003
_TURN_SECONDS = 0.01
_SLOW = 8.0  # times the fastest search, beyond which a contestant cannot be the fastest peer


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Return the time of one of `repeats` consecutive calls: wall time on the CPU, events on a CUDA device."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last) / repeats


def interleave(
    calls: dict[str, Callable[[], Any]],
    *,
    budget: float,
    device: torch.device | None = None,
    slow: float = math.inf,
) -> dict[str, list[float]]:
    """Return the seconds of each call, measured in turns, so that other load affects all of them alike.

    A turn of a short call consists of many consecutive calls, after one that is not timed: this measures a call in a
    program that makes it all the time, not the cost of waking threads and refilling caches.

    Args:
        calls: the timed functions, by name.
        budget: seconds after which no round beyond the ninth starts; 0 for 3 rounds. There are at most 60.
        slow: calls slower than the fastest one by this factor are left out after 3 rounds.
    """
    device = device or torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        seconds_of(call, device)
        repeats[name] = min(1000, math.ceil(_TURN_SECONDS / max(1e-9, seconds_of(call, device))))
    start = time.perf_counter()
    running = dict(calls)
    for done in range(60):
        if done == 3:
            medians = {name: statistics.median(taken) for name, taken in times.items()}
            running = {name: call for name, call in calls.items() if medians[name] <= slow * min(medians.values())}
        if done >= (9 if budget else 3) and time.perf_counter() - start > budget:
            break
        for name, call in running.items():
            time.sleep(_SETTLE_SECONDS)
            if repeats[name] > 1:
                call()
            times[name].append(seconds_of(call, device, repeats[name]))
    return times


def wrong_indices(indices: Tensor, x: Tensor, codebook: Tensor) -> tuple[int, int]:
    """Return how many rows, of a sample spread over the batch, have an index that differs from the specification's.

    The second number is the size of the sample.
    """
    count = max(8, min(CHECKED_ROWS, len(x), _CHECKED_ELEMENTS // codebook.numel()))
    rows = torch.linspace(0, len(x) - 1, min(count, len(x))).long().to(x.device)
    return int((indices.to(x.device)[rows] != reference.search(x[rows], codebook)).sum()), len(rows)


def measure_search(
    shape: Shape, x: Tensor, codebook: Tensor, *, budget: float = 4.0, entrants: list[Contestant] | None = None
) -> list[dict[str, Any]]:
    """Return one record for each contestant: its results, or why it did not run.

    The results are name, median seconds, GFLOP/s of 2 N K D, and the number of wrong indices.

    Raises:
        WrongResultError: a backend of fastvq is wrong.
    """
    records: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    for entrant in entrants if entrants is not None else contestants(x.device):
        record: dict[str, Any] = {"name": entrant.name}
        records.append(record)
        if reason := entrant.why_not(shape, x.dtype, x.device):
            record["not_run"] = reason
            continue
        call = entrant.prepare(x, codebook)
        result = call()
        if result is not None:
            record["wrong"], record["checked"] = wrong_indices(result, x, codebook)
            if record["wrong"] and entrant.name.startswith("fastvq"):
                raise WrongResultError(f"{entrant.name} is wrong in {record['wrong']} of {record['checked']}: {shape}")
        calls[entrant.name] = call
    times = interleave(calls, budget=budget, device=x.device, slow=_SLOW)
    for record in records:
        if record["name"] in times:
            seconds = statistics.median(times[record["name"]])
            record |= {
                "seconds": seconds,
                "runs": len(times[record["name"]]),
                "gflops": 2e-9 * _volume(shape) / seconds,
            }
    return records


def _volume(shape: Shape) -> int:
    return shape.n * shape.k * shape.d


def in_fresh_process(arguments: list[str], environment: dict[str, str] | None = None) -> Any:
    """Return the JSON that `python -m fastvq.bench.worker ARGUMENTS` prints.

    `environment` replaces the inherited one.
    """
    command = [sys.executable, "-m", "fastvq.bench.worker", *arguments]
    done = subprocess.run(command, text=True, capture_output=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def extra_bytes(call: Callable[[], Any]) -> int:
    """Return the peak memory of the process during a call beyond what it held before; Linux only.

    It must be the first call of its kind in a process: memory that an earlier call left to the allocator would not be
    seen.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current value
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def search_memory(name: str, shape: Shape) -> int:
    """Return the extra bytes of a contestant's search of clustered data.

    A search of eight vectors loads its libraries first.
    """
    entrant = next(c for c in CONTESTANTS if c.name == name)
    for size in (Shape(8, 16, shape.d), shape):
        call = entrant.prepare(*DATA["clustered"](size))
        if size is not shape:
            call()
    return extra_bytes(call)
