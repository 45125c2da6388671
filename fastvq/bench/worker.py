"""Measurements in a process of their own, which depend on the environment or on earlier work in the process.

python -m fastvq.bench.worker time NAME N K D THREADS        median seconds of a search of clustered data
python -m fastvq.bench.worker search-memory NAME N K D       extra bytes of a search
python -m fastvq.bench.worker step-memory NAME N K D         extra bytes of a training step
"""

from __future__ import annotations

import json
import statistics
import sys

import torch

from .data import Shape, clustered
from .measure import interleave, search_memory
from .peers import CONTESTANTS
from .training import step_memory


def main(arguments: list[str]) -> None:
    """Measure what the command line asks for, and print the figure as JSON."""
    what, name, *numbers = arguments
    n, k, d, *rest = map(int, numbers)
    torch.set_num_threads(rest[0] if rest else 2)
    shape = Shape(n, k, d)
    if what == "time":
        call = next(c for c in CONTESTANTS if c.name == name).prepare(*clustered(shape))
        print(json.dumps(statistics.median(interleave({name: call}, budget=2.0)[name])))
    else:
        print(json.dumps({"search-memory": search_memory, "step-memory": step_memory}[what](name, shape)))


if __name__ == "__main__":
    main(sys.argv[1:])
