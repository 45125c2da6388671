"""Latency of one small call: `search` of one vector beside `torch.addmm(...).argmin()`, and the Python frames in it.

    python benchmarks/bench_dispatch.py

The contestants take turns in one process, so that a busy machine slows all of them; compare the medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

import fastvq

CALLS = 20
"""Calls between two looks at the clock."""


def contestants(n: int, k: int, d: int) -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    half, transposed = codebook.square().sum(1) / 2, codebook.t()

    def by_torch() -> torch.Tensor:
        return torch.addmm(half, x, transposed, beta=1, alpha=-1).argmin(1)

    def by_search() -> torch.Tensor:
        return fastvq.search(x, codebook)

    op = torch.ops.fastvq.search.default
    assert torch.equal(by_torch(), by_search())
    return {
        "addmm().argmin()": by_torch,
        "fastvq.search": by_search,
        "torch.ops.fastvq.search": lambda: op(x, codebook),
    }


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of a call in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: statistics.median(values[len(values) // 10 :]) for name, values in times.items()}


def frames(call: Callable[[], object]) -> list[str]:
    """Return the Python functions that a call enters, as file:function, the call itself left out."""
    entered: list[str] = []

    def see(frame: object, event: str, argument: object) -> None:
        if event == "call":
            code = frame.f_code  # type: ignore[attr-defined]
            entered.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}")

    call()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 1024, 128), metavar=("N", "K", "D"))
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, k, d = options.shape
    calls = contestants(n, k, d)
    print(f"N={n} K={k} D={d}, {options.threads} threads, torch {torch.__version__}")
    results = medians(calls, options.rounds)
    base = results["addmm().argmin()"]
    for name, median in results.items():
        print(f"  {name:24} {median:7.1f} us  {median / base:5.2f}")
    entered = frames(calls["fastvq.search"])
    print(f"Python frames from fastvq.search to the kernel: {len(entered)}")
    for function in entered:
        print(f"  {function}")


if __name__ == "__main__":
    main()
