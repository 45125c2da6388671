"""Rows that the scans of the CUDA kernels leave uncertified, counted in the emulator of tests/cuda.

    python benchmarks/uncertified_rows.py [--data latents] [--n 1024] [--k 8192] [--d 64]

No GPU is needed: whether a row is certified depends on the data and on the bound, hardly on the order of the sums.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fastvq.bench.data import DATA, Shape
from tests.cuda import emulation


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="latents")
    for name, size in (("n", 1024), ("k", 8192), ("d", 64)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args()
    shape = Shape(options.n, options.k, options.d)
    ((_, counts),) = emulation.run([emulation.search(*DATA[options.data](shape), path="matrix")])
    first, second = (counts / shape.n).tolist()
    print(f"{options.data}, {shape}: one product leaves {first:.1%} of the rows uncertified, three leave {second:.1%}")


if __name__ == "__main__":
    main()
