"""`fastvq bench`: the time of one search beside other libraries, or the whole suite."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "time a search beside other libraries, or run the benchmark suite"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--n", type=int, default=16384, help="number of vectors (default: %(default)s)")
    parser.add_argument("--k", type=int, default=1024, help="number of codes (default: %(default)s)")
    parser.add_argument("--d", type=int, default=64, help="dimensions (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--data", default="clustered", help="gaussian, clustered, latents or an .npy file (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of every contestant (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements as JSON")
    parser.add_argument("--model", metavar="GPU", help="only predict the time on an a100, h100, h200, b200 or mi300x")
    parser.add_argument(
        "--uncertified-share",
        type=float,
        default=0.01,
        help="with --model: share of rows that the first scan leaves uncertified (default: %(default)s)",
    )
    parser.add_argument(
        "--suite", action="store_true", help="run the whole suite, about 13 minutes, and write its report"
    )
    parser.add_argument(
        "--render", action="store_true", help="only write the reports again, from benchmarks.json and gpu.json"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the report (default: %(default)s)")
    parser.add_argument("--readme", type=Path, help="a README whose marked figures are updated")


def run(options: argparse.Namespace) -> int:
    """Measure one shape, predict it, or run the suite."""
    from fastvq.bench import commands

    sizes = (options.n, options.k, options.d)
    if options.render:
        lines = commands.render(options.out, options.readme)
    elif options.suite:
        lines = commands.write_suite(options.out, options.readme)
    elif options.model is not None:
        lines = commands.model_shape(
            options.model,
            sizes,
            dtype=options.dtype,
            uncertified_share=options.uncertified_share,
            json_path=options.json,
        )
    else:
        lines = commands.bench_shape(
            sizes,
            dtype=options.dtype,
            data=options.data,
            device=options.device,
            threads=options.threads,
            json_path=options.json,
        )
    print("\n".join(lines))
    return 0
