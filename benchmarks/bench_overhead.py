"""The Python overhead of a training step: files entered, calls made, and the time of a step on four vectors.

    python benchmarks/bench_overhead.py [--calls]

Files and calls are those of fastvq itself, kernels/ included, counted by `sys.setprofile` during forward and backward.
Comprehensions are not counted: before Python 3.12 they have frames of their own. The time depends on the machine.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fastvq
import fastvq.kernels

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "VectorQuantize": lambda: fastvq.VectorQuantize(64, 512),
    "ResidualVQ": lambda: fastvq.ResidualVQ(dim=64, num_quantizers=4, codebook_size=512),
}
SHAPE = (4, 256, 64)
TINY = (1, 4, 64)
WARM_UP, STEPS = 20, 500
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")
OPS = ("fastvq/ops/", "fastvq/backends/", "fastvq/kernels/", "kernels/")
ROOTS = tuple(str(Path(package.__file__ or "").parent) + os.sep for package in (fastvq, fastvq.kernels))


class Overhead(NamedTuple):
    """The Python calls of fastvq's code in a training step."""

    calls: collections.Counter[str]  # "file:function" -> calls

    @property
    def files(self) -> list[str]:
        """The files that the calls enter."""
        return sorted({name.rpartition(":")[0] for name in self.calls})

    def without_ops(self) -> Overhead:
        """Return the calls outside of the ops and their backends."""
        own = {name: calls for name, calls in self.calls.items() if not name.startswith(OPS)}
        return Overhead(collections.Counter(own))


def training_step(layer: nn.Module, x: torch.Tensor) -> None:
    """Run forward and backward."""
    quantized, _, loss = layer(x)
    (quantized.square().mean() + loss.sum()).backward()


def count(layer: nn.Module, shape: tuple[int, ...] = SHAPE) -> Overhead:
    """Count the files and calls of a training step after three others."""
    x = torch.randn(shape, requires_grad=True)
    for _ in range(3):
        training_step(layer, x)
    calls: collections.Counter[str] = collections.Counter()

    def profile(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOTS) and code.co_name not in COMPREHENSIONS:
            calls[f"{os.path.relpath(code.co_filename, Path(ROOTS[0]).parent)}:{code.co_name}"] += 1

    sys.setprofile(profile)
    try:
        training_step(layer, x)
    finally:
        sys.setprofile(None)
    return Overhead(calls)


def microseconds(layer: nn.Module, shape: tuple[int, ...] = TINY) -> float:
    """Return the median time of a training step."""
    x, times = torch.randn(shape, requires_grad=True), []
    for i in range(WARM_UP + STEPS):
        start = time.perf_counter()
        training_step(layer, x)
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Print the overhead of each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", action="store_true", help="also print every function with its number of calls")
    options = parser.parse_args()
    for name, build in LAYERS.items():
        torch.manual_seed(0)
        overhead = count(build())
        for counted, what in ((overhead, "in all"), (overhead.without_ops(), "without the ops")):
            print(f"{name:15} {len(counted.files):3} files {counted.calls.total():4} calls {what}")
        print(f"{name:15} {microseconds(build()):.0f} us for {TINY[1]} vectors")
        for function, calls in sorted(overhead.calls.items()) if options.calls else ():
            print(f"    {calls:3} {function}")


if __name__ == "__main__":
    main()
