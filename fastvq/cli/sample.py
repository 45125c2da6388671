"""`fastvq sample`: new images, sampled from a run's prior."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.errors import ConfigError

from .options import add_data, add_sampling, given_sampling

SUMMARY = "sample new images or other data from a run's prior"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Samples new images, audio or video from a run's prior. Without --out, samples, completions and neighbors are"
        " drawn for the page of the run, DIR/index.html. Otherwise the ending of OUT decides what is written: a picture"
        " (.png, .pdf,"
        " .svg, .jpg, .tif, .webp) of some samples beside real ones, of each class if there are classes, or of N"
        " samples in rows and columns with --count or --text; .npy, the"
        " indices alone, which `fastvq encode` accepts; no ending, or a / at its end, a new folder of files, with a"
        " subfolder for each class if there are classes."
    )
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--out", metavar="OUT", help="a picture, an .npy or a new folder")
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="number of samples (default: 100 in an .npy or a folder, 16 of one --label or --text)",
    )
    parser.add_argument(
        "--label", metavar="L", help="class of the samples, by name or by number from 0 (default: each class in turn)"
    )
    parser.add_argument(
        "--text",
        metavar="TEXT",
        help="what the samples show, such as 'red heart', for a prior of `fastvq prior --text`",
    )
    parser.add_argument(
        "--rerank",
        type=int,
        metavar="M",
        help="draw M samples and keep the ones that the model of `fastvq contrast` finds most similar to the text",
    )
    parser.add_argument(
        "--complete", action="store_true", help="draw completions of held-out examples from their first halves"
    )
    parser.add_argument(
        "--begin",
        metavar="FILE",
        help="a file whose beginning all samples keep: the top of an image, the first frames of a video, the first"
        " seconds of a sound (without --label, no class is given)",
    )
    parser.add_argument("--share", type=float, help="share of FILE that is kept (default: 0.5)", metavar="S")
    add_sampling(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="equal seeds give equal samples, and a smaller N the first samples of a larger one (default: 0)",
    )
    add_data(parser)


def run(options: argparse.Namespace) -> int:
    """Sample from the prior of a run, and write the samples."""
    from fastvq.runs.sample import sample_run

    names = ("count", "label", "text", "rerank", "complete", "begin", "share", "seed", "data")
    given = {name: getattr(options, name) for name in names}
    try:
        lines = sample_run(options.run_folder, options.out, **given, **given_sampling(options))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print("\n".join(lines))
    return 0
