"""Interleaved timing, checked results, and memory as the operating system sees it."""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.backends import native
from fastvq.errors import WrongResultError, first_line

from .data import DATA, Shape
from .exact import nearest
from .peers import CONTESTANTS, NATIVE, Contestant, contestants

CHECKED_OPERATIONS, CHECKED_PAIRS = 1 << 35, 1 << 29
"""Multiply-adds and distances for which rows are checked: all rows of nearly every shape of the suite."""
# Another library's threads spin for a while after their work; the next contestant must not share the cores with them.
_SETTLE_SECONDS = 0.003
_TURN_SECONDS = 0.01
SQUARE, PEAK_TURNS = 2048, 5
_SLOW = 8.0  # times the fastest search, beyond which a contestant cannot be the fastest peer


def seconds_of(
    call: Callable[[], Any],
    device: torch.device,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the time of one of `repeats` consecutive calls: by the clock on the CPU, by events on a CUDA device."""
    if device.type != "cuda":
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats
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
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each call, measured in turns, so that other load affects all of them alike.

    A turn of a short call consists of many consecutive calls, after one that is not timed: this measures a call in a
    program that makes it all the time, not the cost of waking threads and refilling caches.

    Args:
        calls: the timed functions, by name.
        budget: seconds after which no round beyond the ninth starts; 0 for 3 rounds. There are at most 60.
        slow: calls slower than the fastest one by this factor are left out after 3 rounds.
        clock: `time.process_time` for the time of the processor instead.
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
            times[name].append(seconds_of(call, device, repeats[name], clock))
    return times


def checked_rows(x: Tensor, codebook: Tensor) -> Tensor:
    """Return the rows to check: all of them, or as many as CHECKED_OPERATIONS allow, spread over the whole batch."""
    count = max(8, min(CHECKED_OPERATIONS // codebook.numel(), CHECKED_PAIRS // len(codebook)))
    return torch.linspace(0, len(x) - 1, min(count, len(x)), dtype=torch.float64).round().long().to(x.device)


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
    rows = checked_rows(x, codebook)
    expected = nearest(x[rows], codebook)
    for entrant in entrants if entrants is not None else contestants(x.device):
        record: dict[str, Any] = {"name": entrant.name}
        records.append(record)
        if reason := entrant.why_not(shape, x.dtype, x.device):
            record["not_run"] = reason
            continue
        try:
            call = entrant.prepare(x, codebook)
            result = call()
        except Exception as error:
            if entrant.name.startswith("fastvq"):
                raise
            record["not_run"] = f"fails: {first_line(error)}"
            continue
        if result is not None:
            record["wrong"] = int((result.to(x.device)[rows] != expected).sum())
            record["checked"] = len(rows)
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


def beside_peak(kind: str, shape: Shape, threads: int) -> dict[str, float]:
    """Return medians of turns: seconds of the native search, peak GFLOP/s of `kind`, and those of a square torch.mm.

    What disturbs the machine lowers all three, while a peak taken alone is the best moment of a run. The product, of
    float32, is a program that others have tuned for years: what it reaches of a peak is what a program can reach.
    """
    call = next(c for c in CONTESTANTS if c.name == NATIVE).prepare(*DATA["clustered"](shape))
    square = torch.randn(SQUARE, SQUARE)
    product = functools.partial(torch.mm, square, square, out=torch.empty_like(square))
    cpu, taken = torch.device("cpu"), []
    for _ in range(PEAK_TURNS + 1):
        rates = [native.peak(name, threads) or math.nan for name in (kind, "float32")]
        taken.append((seconds_of(call, cpu), *rates, seconds_of(product, cpu)))
    seconds, peak, float32, square_seconds = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    return {"seconds": seconds, "peak": peak, "float32_peak": float32, "product": 2e-9 * SQUARE**3 / square_seconds}


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


def in_a_child(measure: Callable[[], int]) -> int:
    """Return what `measure` returns in a fork of this process; Linux only.

    A fork is a fresh process for the allocator, and has imported all that this one has. No thread of torch may have
    run in this process.

    Raises:
        RuntimeError: the child failed; its error is on stderr.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, str(measure()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise RuntimeError(f"the measurement ended with {status}")
    return int(text)


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
