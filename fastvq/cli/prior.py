"""`fastvq prior`: a prior over the indices of a run's images."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from fastvq.errors import ConfigError

from . import INTERRUPTED
from .options import add_settings, given_settings

SUMMARY = "train a prior over the indices of a run's images"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from fastvq.training.config import PriorConfig

    parser.description = (
        "Trains a prior over the indices of a run's images in DIR/prior/, and prints the bits per index of held-out"
        " images. An earlier prior there is replaced."
    )
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training with its own settings")
    parser.add_argument(
        "--compare",
        type=float,
        metavar="SECONDS",
        help="only train each kind of prior for SECONDS of processor time, and compare them",
    )
    add_settings(parser, PriorConfig)


def run(options: argparse.Namespace) -> int:
    """Train the prior of a run, or compare the kinds of priors."""
    from fastvq.runs.pictures import picture_prior
    from fastvq.runs.train_prior import check_resumed, train_prior
    from fastvq.training.config import PriorConfig

    given = given_settings(options, PriorConfig)
    config = PriorConfig(**given)
    if options.compare is not None:
        from fastvq.runs.compare_priors import FIXED_SETTINGS, compare_priors

        unused = [name for name in FIXED_SETTINGS if name in given] + ["resume"] * options.resume
        if unused:
            raise ConfigError(f"--compare trains each kind from the start for equal time: omit {', '.join(unused)}")
        print("\n".join(compare_priors(options.run_folder, options.compare, config=config)))
        return 0
    if options.resume:
        check_resumed(options.run_folder, given)
    trained = train_prior(options.run_folder, config, resume=options.resume)
    if trained is None:
        print(f"stopped, saved; continue with: fastvq prior {shlex.quote(str(options.run_folder))} --resume")
        return INTERRUPTED
    print(f"{len(trained.data.test)} held-out images: {trained.bits_per_index:.2f} bits per index")
    print(f"picture: {picture_prior(options.run_folder)}")
    return 0
