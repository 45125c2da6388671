"""`fastvq contrast`: a contrastive model of a run's images and captions, which ranks samples of a text."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from . import INTERRUPTED
from .options import add_config, add_data, add_logger, add_settings, given_settings

SUMMARY = "train a contrastive model of a run's images and captions, which ranks samples"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from fastvq.training.config import ContrastiveConfig

    parser.description = (
        "Trains a contrastive model of a run's images and captions in DIR/contrastive/, and prints how often it finds"
        " the caption of a held-out image. `fastvq sample DIR --text TEXT --rerank M` keeps the samples that it finds"
        " most similar to the text."
    )
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training; --steps may be more")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that the run has")
    add_data(parser)
    add_config(parser)
    add_logger(parser)
    add_settings(parser, ContrastiveConfig)


def run(options: argparse.Namespace) -> int:
    """Train the contrastive model of a run."""
    from fastvq.runs.contrast import resumed_contrastive, train_contrastive
    from fastvq.training.config import ContrastiveConfig
    from fastvq.training.loggers import check_logger
    from fastvq.training.loop import describe_resumed

    check_logger(options.logger)
    given = given_settings(options, "contrast", ContrastiveConfig)
    resumed = resumed_contrastive(options.run_folder) if options.resume else None
    config = ContrastiveConfig(**given) if resumed is None else dataclasses.replace(resumed.config, **given)
    if resumed is not None:
        print(describe_resumed(resumed, config), flush=True)
    trained = train_contrastive(
        options.run_folder,
        config,
        resume=options.resume,
        overwrite=options.overwrite,
        data=options.data,
        logger=options.logger,
    )
    if trained is None:
        print(f"stopped, saved; continue with: fastvq contrast {shlex.quote(str(options.run_folder))} --resume")
        return INTERRUPTED
    print(
        f"the caption of {trained.retrieval:.0%} of the held-out images is the nearest among {trained.candidates};"
        f" by chance {1 / max(1, trained.candidates):.0%}"
    )
    return 0
