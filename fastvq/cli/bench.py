"""`fastvq bench`: the time of one search beside other libraries, or the whole suite."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastvq.errors import BenchError

SUMMARY = "time a search beside other libraries, or run the benchmark suite"
# The options that a prediction takes, and those that a measurement takes besides them.
_PREDICTED = ("n", "k", "d", "dtype", "json_path")
_MEASURED = ("data", "device", "threads")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--n", type=int, help="number of vectors (default: 16384; all of a FILE.npy)")
    parser.add_argument("--k", type=int, help="number of codes (default: 1024; at most the vectors of a FILE.npy)")
    parser.add_argument("--d", type=int, help="dimensions (default: 64; those of a FILE.npy)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float32)")
    parser.add_argument(
        "--data",
        help="gaussian, clustered, copies, directed, latents, audio, audio-stage-3, or FILE.npy with vectors (N, D) or "
        "(..., D) (default: clustered)",
    )
    parser.add_argument("--device", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of every contestant (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE.json", dest="json_path", help="also write the measurements")
    parser.add_argument("--model", metavar="GPU", help="only predict the time on an a100, h100, h200, b200 or mi300x")
    parser.add_argument(
        "--uncertified-share",
        type=float,
        help="with --model: share of rows that the first scan leaves uncertified (default: 0.01)",
    )
    parser.add_argument(
        "--suite", action="store_true", help="run the whole suite, about 15 minutes, and write its report"
    )
    parser.add_argument(
        "--render", action="store_true", help="only write the reports again, from benchmarks.json and gpu.json"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report (default: docs)")
    parser.add_argument("--readme", type=Path, help="a README whose marked figures are updated")


def run(options: argparse.Namespace) -> int:
    """Measure one shape, predict it, or run the suite."""
    from fastvq.bench import commands

    if options.suite or options.render:
        if options.suite and options.render:
            raise BenchError("render: has no effect with --suite, which writes the report as well")
        write = commands.write_suite if options.suite else commands.render
        given = _given(options, ("out", "readme"), "with --suite or --render")
        lines = write(given.get("out", "docs"), given.get("readme"))
    elif options.model is not None:
        given = _given(options, ("model", "uncertified_share", *_PREDICTED), "with --model")
        lines = commands.model_shape(given.pop("model"), **given)
    else:
        lines = commands.bench_shape(**_given(options, (*_PREDICTED, *_MEASURED), "without --suite or --model"))
    print("\n".join(lines))
    return 0


def _given(options: argparse.Namespace, usable: tuple[str, ...], mode: str) -> dict[str, Any]:
    """Return the options that are given, all of which must be usable in this mode."""
    names = ("out", "readme", "model", "uncertified_share", *_PREDICTED, *_MEASURED)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in given:
        if name not in usable:
            raise BenchError(f"{name}: has no effect {mode}")
    return given
