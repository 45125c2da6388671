"""`fastvq evaluate`: quality, bits and use of the codebook of a run, with intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.errors import ConfigError

from .options import SAMPLING, add_sampling, given_sampling, refuse_without_effect

SUMMARY = "measure a run on held-out examples: quality, bits, use of the codebook"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Measures a run on examples: quality (for images PSNR, SSIM, MS-SSIM, LPIPS, rFID; for audio the log-mel"
        " distance, SI-SDR, PESQ, STOI, ViSQOL), bits, usage and perplexity, with 95 % intervals."
        " What cannot be measured is named with the reason. With --samples it judges samples of the run's prior"
        " instead: agreement with their class, precision and recall, distance to training examples. The protocol is"
        " in docs/evaluation.md."
    )
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="other data: a name of a data set, whose held-out examples are taken, or a folder, all of whose files are"
        " (default: the run's held-out examples, also where --data says where they have moved)",
    )
    parser.add_argument("--out", metavar="OUT", help="the numbers as .json (default: DIR/evaluation.json)")
    parser.add_argument("--device", help="torch device (default: cpu)")
    parser.add_argument(
        "--download", action="store_true", help="download the weights that LPIPS and rFID need, if they are not here"
    )
    parser.add_argument(
        "--samples",
        type=int,
        nargs="?",
        const=500,
        metavar="N",
        help="judge N samples of the prior, at most as many as examples are held out (default: 500); DIR/samples.json",
    )
    add_sampling(parser)


def run(options: argparse.Namespace) -> int:
    """Measure the run or samples of its prior, write the numbers and print them as a table."""
    from fastvq.runs.evaluate import evaluate_run
    from fastvq.runs.judge import judge_run
    from fastvq.runs.pictures import failures_as_warnings
    from fastvq.runs.run_page import write_run_page
    from fastvq.training import ranks

    if options.samples is None:
        refuse_without_effect(options, SAMPLING, "without --samples")
        device = options.device or "cpu"
        lines = evaluate_run(
            options.run_folder, options.out, data=options.data, device=device, download=options.download
        )
    else:
        refuse_without_effect(options, ("out", "device", "download"), "with --samples")
        if not ranks.alone():
            raise ConfigError("samples: are judged in one process, start it without torchrun")
        try:
            lines = judge_run(options.run_folder, count=options.samples, data=options.data, **given_sampling(options))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    print("\n".join(lines))
    if ranks.leads():
        with failures_as_warnings("page of the run"):
            write_run_page(options.run_folder)
    return 0
