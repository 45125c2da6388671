"""Sizes of a run: those of a GPU, and tiny ones that a CPU takes through every line of every step."""

from __future__ import annotations

from typing import NamedTuple

from fastvq.bench.data import Shape


class Sizes(NamedTuple):
    """Sizes of the steps of a run."""

    adversarial: tuple[Shape, ...]
    """Shapes of the adversarial set, which is searched by the definition too."""
    data: tuple[str, ...]
    """Data of the adversarial set; all if empty."""
    exact: tuple[Shape, ...]
    """Shapes whose every row is checked in float64."""
    timed: tuple[Shape, ...]
    iteration: Shape
    """An iteration of k-means, for which others have published times."""
    stages: int
    """Codebooks of a residual search."""
    few: tuple[Shape, ...]
    """Shapes of few rows, for the CUDA kernels that take only these."""
    slowest: float
    """N K D beyond which residual searches are left out and all else is measured three times only."""
    matrix: int
    """Side of the matrices by which the device's rates are measured."""
    tests: tuple[str, ...]
    """Files of tests that are marked `gpu`."""
    kernel_tests: tuple[str, ...]
    """Files of tests that run in Triton's interpreter where there is no GPU."""
    budget: float
    """Seconds for the measurements of one case, beyond the fewest rounds."""


FULL = Sizes(
    # One for each of the ways of a search, with rests.
    adversarial=tuple(
        Shape(*s)
        for s in (
            (5, 9, 3),
            (64, 300, 33),
            (70, 500, 3),
            (700, 1000, 8),
            (600, 999, 16),
            (500, 700, 33),
            (300, 400, 130),
        )
    ),
    data=(),
    exact=tuple(
        Shape(*s)
        for s in (
            (65536, 1024, 64),
            (65536, 8192, 64),
            (65536, 16384, 8),
            (16384, 8192, 256),
            (8192, 65536, 16),
            (65536, 16384, 3),
            (4096, 8192, 1024),
            (1, 2048, 256),
            (75, 1024, 128),
            (1048576, 65536, 128),
        )
    ),
    timed=tuple(
        Shape(*s)
        for s in (
            (65536, 1024, 64),
            (65536, 8192, 64),
            (65536, 16384, 8),
            (16384, 8192, 256),
            (1048576, 65536, 128),
        )
    ),
    iteration=Shape(524288, 4096, 256),
    stages=8,
    few=(Shape(1, 2048, 256), Shape(75, 1024, 128), Shape(1024, 1024, 64), Shape(4096, 8192, 64)),
    slowest=2e11,
    matrix=8192,
    tests=("tests/kernels/test_gpu.py", "tests/cuda/test_gpu.py"),
    kernel_tests=(
        "tests/kernels/test_search.py",
        "tests/kernels/test_residual_search.py",
        "tests/kernels/test_accumulate.py",
        "tests/kernels/test_ema_update.py",
        "tests/kernels/test_quantize.py",
        "tests/kernels/test_backend.py",
    ),
    budget=0.6,
)
TINY = Sizes(
    adversarial=(Shape(5, 9, 3),),
    data=("non_finite_codes",),
    exact=(Shape(9, 10, 3),),
    timed=(Shape(16, 9, 4),),
    iteration=Shape(16, 9, 4),
    stages=2,
    few=(Shape(3, 20, 4),),
    slowest=1e9,
    matrix=32,
    tests=("tests/kernels/test_gpu.py",),
    kernel_tests=("tests/kernels/test_ema_update.py",),
    budget=0.0,
)
