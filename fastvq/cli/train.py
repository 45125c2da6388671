"""`fastvq train`: a VQ-VAE, trained on images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvq.errors import ConfigError

from . import INTERRUPTED
from .options import add_config, add_logger, add_settings, given_settings, take_named

if TYPE_CHECKING:
    from fastvq.training import TrainConfig

SUMMARY = "train a VQ-VAE on images"
# A folder holds photographs rather than the small gray images that the defaults are for.
_FOLDER_SETTINGS: dict[str, Any] = {"image_size": 64, "grayscale": False}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from fastvq.training.config import PRESETS, TrainConfig

    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the latest checkpoint in --out, with its settings; --steps may be more, and --data where"
        " the same images are now",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="settings that replace the defaults; other options come before them"
    )
    add_config(parser)
    add_logger(parser)
    add_settings(parser, TrainConfig)
    parser.epilog = (
        "Further options are those of the bottleneck, such as --num-quantizers 8 beside --bottleneck rvq, or --levels"
        " 8,5,5,5 beside --bottleneck fsq. An unknown one is answered with the list of those that there are."
    )


def take_more_options(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """Keep the options of the bottleneck, which no parser knows, and return the other arguments."""
    options.bottleneck_arguments, others = take_named(arguments)
    return others


def run(options: argparse.Namespace) -> int:
    """Train, and draw the pictures of the run."""
    from fastvq.data.images import describe
    from fastvq.data.registry import check_outside
    from fastvq.errors import counted
    from fastvq.files import exclusive
    from fastvq.runs.outputs import check_no_other_files
    from fastvq.runs.page import PAGE
    from fastvq.runs.pictures import failures_as_warnings, picture_reconstructions, picture_run
    from fastvq.runs.run_page import write_run_page
    from fastvq.training import Evaluation, Trainer, load_images, ranks
    from fastvq.training.checkpoint import load_latest
    from fastvq.training.loggers import check_logger
    from fastvq.training.loop import describe_resumed, usable_device

    check_logger(options.logger)
    config = _settings(options)
    usable_device(config.device)  # before images are read
    if options.resume:
        print(describe_resumed(load_latest(options.out, tensors=False), config), flush=True)
    images = ranks.rank_0_first(lambda: load_images(config, progress=ranks.leads()))
    if not options.resume:
        check_outside(options.out, config.data, "out")
        check_no_other_files(options.out)
    trainer = Trainer(config, images, options.out, resume=options.resume)
    print(describe(images))

    def draw(trainer: Trainer, evaluation: Evaluation) -> None:
        with failures_as_warnings("picture of reconstructions"):
            step = trainer.step
            picture_reconstructions(options.out, trainer.trained, images, evaluation, step=step, captioned=False)
        with failures_as_warnings("page of the run"):
            write_run_page(options.out)

    with exclusive(options.out) if ranks.leads() else contextlib.nullcontext():
        evaluation = trainer.fit(on_evaluation=draw, logger=options.logger)
        if evaluation is None:
            again = f"fastvq train --out {shlex.quote(str(options.out))} --resume"
            print(f"stopped at step {trainer.step}, saved; continue with: {again}")
            return INTERRUPTED
        if ranks.leads():
            picture_run(trainer, evaluation, captioned=False)
            with failures_as_warnings("page of the run"):
                write_run_page(options.out)
    perplexity = "" if evaluation.perplexity is None else f", perplexity {evaluation.perplexity:.0f}"
    print(f"{counted(len(images.test), 'held-out image')}: {evaluation.psnr_db:.2f} dB{perplexity}")
    if (options.out / PAGE).exists():
        print(f"pictures and settings: {options.out / PAGE}")
    return 0


def _settings(options: argparse.Namespace) -> TrainConfig:
    """Return the requested settings; those not given are the resumed run's own, or the defaults."""
    from fastvq.data import DATA_SETS
    from fastvq.training.checkpoint import load_latest
    from fastvq.training.config import PRESETS, TrainConfig

    given = given_settings(options, TrainConfig, "train")
    own = load_latest(options.out).config if options.resume else None
    arguments = getattr(options, "bottleneck_arguments", {})
    if arguments:
        earlier = TrainConfig() if own is None else own
        chosen = _bottleneck_options(given.get("bottleneck", earlier.bottleneck), arguments)
        given["bottleneck_options"] = given.get("bottleneck_options", earlier.bottleneck_options) | chosen
    data = given.get("data", TrainConfig.data)
    if not isinstance(data, str):
        raise ConfigError(f"data must be a text, got {data!r}")
    defaults = _FOLDER_SETTINGS
    if data in DATA_SETS:
        defaults = {"image_size": DATA_SETS[data].image_size, "grayscale": DATA_SETS[data].grayscale}
    else:
        # A run that is resumed from another working directory must find the same folder.
        given["data"] = str(Path(data).resolve())
    if own is not None:
        if options.preset is not None:
            raise ConfigError(f"preset: a resumed run keeps its settings, got {options.preset}")
        return dataclasses.replace(own, **given)
    return TrainConfig(**(defaults | PRESETS[options.preset or "vqvae"] | given))


def _bottleneck_options(name: str, given: dict[str, str]) -> dict[str, Any]:
    """Return the options of a bottleneck that is chosen by name, from texts.

    Raises:
        ConfigError: there is no such bottleneck, or it has no such option.
    """
    from fastvq.models.bottlenecks import KINDS, parse_options
    from fastvq.training.config import TrainConfig

    TrainConfig(bottleneck=name)
    known = KINDS[name].options()
    for option in given:
        if option not in known:
            has = "which has " + ", ".join("--" + one.replace("_", "-") for one in known) if known else "which has none"
            raise ConfigError(
                f"--{option.replace('_', '-')} is no option of fastvq train, nor one of --bottleneck {name}, {has}"
            )
    return parse_options(name, given)
