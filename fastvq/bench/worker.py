"""Measurements in a process of their own, which depend on the environment or on earlier work in the process.

python -m fastvq.bench.worker time NAME N K D THREADS                 median seconds of a search of clustered data
python -m fastvq.bench.worker tier KIND N K D THREADS                 the same of fastvq's native search, in turns with
                                                                      the machine's peak of KIND and torch.mm
python -m fastvq.bench.worker search-memory NAME THREADS N K D ...    extra bytes of a search at each of the shapes
python -m fastvq.bench.worker step-memory NAME THREADS N K D ...      extra bytes of a training step
"""

from __future__ import annotations

import json
import statistics
import sys

import torch

from .data import Shape, clustered
from .measure import beside_peak, in_a_child, interleave, search_memory
from .peers import CONTESTANTS
from .training import step_memory


def main(arguments: list[str]) -> None:
    """Measure what the command line asks for, and print the figure as JSON."""
    what, name, *rest = arguments
    numbers = list(map(int, rest))
    if what.endswith("-memory"):
        threads, *sizes = numbers
        shapes = [Shape(*sizes[i : i + 3]) for i in range(0, len(sizes), 3)]
        print(json.dumps([_memory(what, name, shape, threads) for shape in shapes]))
        return
    *size, threads = numbers
    torch.set_num_threads(threads)
    if what == "time":
        call = next(c for c in CONTESTANTS if c.name == name).prepare(*clustered(Shape(*size)))
        print(json.dumps(statistics.median(interleave({name: call}, budget=2.0)[name])))
    else:
        print(json.dumps(beside_peak(name, Shape(*size), threads)))


def _memory(what: str, name: str, shape: Shape, threads: int) -> int | None:
    """Return the extra bytes, measured in a fork of this process; None if it fails, for which stderr has the reason."""

    def measure() -> int:
        torch.set_num_threads(threads)
        return {"search-memory": search_memory, "step-memory": step_memory}[what](name, shape)

    try:
        return in_a_child(measure)
    except RuntimeError:
        return None


if __name__ == "__main__":
    main(sys.argv[1:])
