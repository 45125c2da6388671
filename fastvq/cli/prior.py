"""`fastvq prior`: a prior over the indices of a run's images."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from fastvq.errors import ConfigError

from . import INTERRUPTED
from .options import add_config, add_data, add_logger, add_settings, given_settings, refuse_without_effect

SUMMARY = "train a prior over the indices of a run's examples"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from fastvq.training.config import PriorConfig

    parser.description = (
        "Trains a prior over the indices of a run's examples in DIR/prior/, and prints the bits per index of held-out"
        " ones. A prior that is there already is resumed or replaced only where --resume or --overwrite says so."
    )
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted training with its own settings; --steps may be more",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="train a successor of the run's prior, which takes its place when it is finished; files that were coded"
        " with the earlier prior cannot be decoded then",
    )
    add_data(parser)
    parser.add_argument(
        "--compare",
        type=float,
        metavar="SECONDS",
        dest="seconds",
        help="only train each kind of prior for SECONDS of processor time, and compare them",
    )
    add_config(parser)
    add_logger(parser)
    add_settings(parser, PriorConfig)


def run(options: argparse.Namespace) -> int:
    """Train the prior of a run, or compare the kinds of priors."""
    from fastvq.errors import counted
    from fastvq.runs.pictures import failures_as_warnings, picture_prior
    from fastvq.runs.sample import sample_run
    from fastvq.runs.train_prior import resumed_prior, train_prior
    from fastvq.training import ranks
    from fastvq.training.config import WITH_HEADS, PriorConfig
    from fastvq.training.loggers import check_logger
    from fastvq.training.loop import describe_resumed

    check_logger(options.logger)
    given = given_settings(options, "prior", PriorConfig)
    resumed = resumed_prior(options.run_folder) if options.resume else None
    config = PriorConfig(**given) if resumed is None else dataclasses.replace(resumed.config, **given)
    if config.kind not in WITH_HEADS:
        refuse_without_effect(options, ("heads",), f"on a prior of kind {config.kind}")
    if not config.text:
        refuse_without_effect(options, ("text_vocabulary", "text_length", "text_weight"), "without --text")
    if options.seconds is not None:
        from fastvq.runs.compare_priors import FIXED_SETTINGS, compare_priors

        unused = [name for name in FIXED_SETTINGS if name in given]
        unused += [name for name in ("resume", "overwrite") if getattr(options, name)]
        if unused:
            listed = ", ".join("--" + name.replace("_", "-") for name in unused)
            raise ConfigError(f"--compare trains each kind from the start for equal time: omit {listed}")
        if not ranks.alone():
            raise ConfigError("--compare measures one process: start it without torchrun")
        lines = compare_priors(options.run_folder, options.seconds, config=config, data=options.data)
        if lines is None:
            print("stopped; nothing is written")
            return INTERRUPTED
        print("\n".join(lines))
        return 0
    if resumed is not None:
        print(describe_resumed(resumed, config), flush=True)
        if resumed.finished and config.steps > resumed.step:
            lost = f"files that were coded with the prior of step {resumed.step} cannot be decoded afterwards"
            print(f"{lost}: copy the run to keep it", flush=True)
    trained = train_prior(
        options.run_folder,
        config,
        resume=options.resume,
        overwrite=options.overwrite,
        data=options.data,
        logger=options.logger,
    )
    if trained is None:
        print(f"stopped, saved; continue with: fastvq prior {shlex.quote(str(options.run_folder))} --resume")
        return INTERRUPTED
    print(f"{counted(len(trained.data.test), 'held-out example')}: {trained.bits_per_index:.2f} bits per index")
    if ranks.leads():
        with failures_as_warnings("picture of curves of the prior"):
            picture_prior(options.run_folder, captioned=False)
        with failures_as_warnings("picture of samples"):
            print("\n".join(sample_run(options.run_folder, data=options.data)))
    return 0
