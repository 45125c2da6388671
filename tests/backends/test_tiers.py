"""Savings and costs of the cheap tiers: data that defeat int16 take hardly longer than float32 alone.

Each side runs in its own process, since FASTVQ_TIER is read once, and the two take turns. As a script, this file is one
such process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import pytest
import torch

import fastvq
from fastvq.backends import native
from fastvq.bench.measure import interleave

pytestmark = pytest.mark.machine

LIMIT = 1.10
COPIES_LIMIT = 1.5
ATTEMPTS = 4  # a neighbor's load can spoil one


def near_copies(n, k, d, copies, distance):
    """Codes in crowds of near copies, so close that int16 can't tell them apart."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(k // copies, d, generator=g).repeat_interleave(copies, 0)
    codes += distance * torch.randn(k, d, generator=g)
    return codes[torch.randint(k, (n,), generator=g)] + 0.1 * torch.randn(n, d, generator=g), codes


def one_long_row(n, k, d):
    """In each block of rows one so long that it would take the others' precision."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g)
    x[::16] *= 1e4
    return x, torch.randn(k, d, generator=g)


def bad_second_half(n, k, d):
    """Return data whose first rows suit the tier that the others defeat."""
    x, codes = near_copies(n, k, d, 64, 1e-3)
    codes[: k // 2] = torch.randn(k // 2, d, generator=torch.Generator().manual_seed(1))
    x[: n // 2] = codes[: k // 2].repeat(n // k + 1, 1)[: n // 2]
    return x, codes


CASES = {
    "8 near copies": lambda: near_copies(8192, 512, 64, 8, 1e-4),
    "64 near copies": lambda: near_copies(8192, 1024, 64, 64, 1e-3),
    "64 copies, nearer": lambda: near_copies(8192, 1024, 64, 64, 1e-5),
    "64 near copies, many codes": lambda: near_copies(4096, 8192, 32, 64, 1e-3),
    "few codes": lambda: near_copies(16384, 128, 64, 64, 1e-3),
    "short vectors": lambda: near_copies(16384, 512, 8, 64, 1e-4),
    "long rows": lambda: one_long_row(8192, 1024, 64),
    "bad second half": lambda: bad_second_half(8192, 1024, 64),
}


class Side:
    """A process that searches with one setting of FASTVQ_TIER."""

    def __init__(self, case: str, tier: str):
        command = [sys.executable, __file__, case]
        self.process = subprocess.Popen(
            command, env=os.environ | {"FASTVQ_TIER": tier}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def time(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.communicate()


def ratio_of_medians(case):
    with Side(case, "") as automatic, Side(case, "float32") as float32:
        times = [(automatic.time(), float32.time()) for _ in range(15)][2:]
    return statistics.median(t for t, _ in times) / statistics.median(t for _, t in times)


@pytest.mark.parametrize("case", CASES)
def test_data_that_defeat_int16_cost_little(case):
    if native.reasons(torch.device("cpu")):
        pytest.skip("no native library was built")
    ratios = []
    while len(ratios) < ATTEMPTS and (not ratios or min(ratios) > LIMIT):
        ratios.append(ratio_of_medians(case))
    print(f"{case}: {min(ratios):.2f} of the time of float32 alone")
    assert min(ratios) <= LIMIT


COPIES = {
    "zeros": lambda codes: torch.zeros_like(codes),
    "pairs": lambda codes: codes[torch.arange(len(codes)) // 2],
    "seven of each": lambda codes: codes[torch.randint(len(codes) // 7, (len(codes),))],
    "one code": lambda codes: codes[:1].repeat(len(codes), 1),
}


@pytest.mark.parametrize("shape", [(512, 512, 64), (2048, 2048, 256), (16384, 512, 64), (1, 2048, 256)], ids=str)
@pytest.mark.parametrize("kind", COPIES)
def test_copies_cost_little(kind, shape):
    if native.reasons(torch.device("cpu")):
        pytest.skip("no native library was built")
    n, k, d = shape
    x, distinct = torch.randn(n, d), torch.randn(k, d)
    copies = COPIES[kind](distinct)
    ratios = []
    while len(ratios) < ATTEMPTS and (not ratios or min(ratios) > COPIES_LIMIT):
        times = interleave(
            {"copies": lambda: fastvq.search(x, copies), "distinct": lambda: fastvq.search(x, distinct)}, budget=0.5
        )
        ratios.append(statistics.median(times["copies"]) / statistics.median(times["distinct"]))
    print(f"{kind}, {shape}: {min(ratios):.2f} of the time of distinct codes")
    assert min(ratios) <= COPIES_LIMIT


def main() -> None:
    torch.set_num_threads(2)
    x, codes = CASES[sys.argv[1]]()
    for _ in sys.stdin:
        start = time.perf_counter()
        fastvq.search(x, codes)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
