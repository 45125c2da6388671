"""`fastvq evaluate`: quality, bits and use of the codebook of a run, with intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "measure a run on held-out examples: quality, bits, use of the codebook"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Measures a run on examples: quality (for images PSNR, SSIM, MS-SSIM, LPIPS, rFID), bits, usage and perplexity,"
        " with 95 % intervals."
        " What cannot be measured is named with the reason. The protocol is in docs/evaluation.md."
    )
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="other data: a name of a data set, whose held-out examples are taken, or a folder, all of whose files are"
        " (default: the run's held-out examples, also where --data says where they have moved)",
    )
    parser.add_argument("--out", metavar="OUT", help="the numbers as .json (default: DIR/evaluation.json)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--download", action="store_true", help="download the weights that LPIPS and rFID need, if they are not here"
    )


def run(options: argparse.Namespace) -> int:
    """Measure the run, write the numbers and print them as a table."""
    from fastvq.runs.evaluate import evaluate_run
    from fastvq.runs.pictures import failures_as_warnings
    from fastvq.runs.run_page import write_run_page
    from fastvq.training import ranks

    given = {name: getattr(options, name) for name in ("data", "device", "download")}
    print("\n".join(evaluate_run(options.run_folder, options.out, **given)))
    if ranks.leads():
        with failures_as_warnings("page of the run"):
            write_run_page(options.run_folder)
    return 0
