"""`fastvq train`: a VQ-VAE, trained on images or other data."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvq.errors import ConfigError

from . import INTERRUPTED
from .options import add_config, add_logger, add_settings, given_settings, refuse_without_effect, take_named

if TYPE_CHECKING:
    from fastvq.training import TrainConfig

SUMMARY = "train a VQ-VAE on images or other data"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from fastvq.modalities import NAMES, config_of

    out = parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--plan",
        action=_InPlaceOf,
        nargs=0,
        const=True,
        default=False,
        other=out,
        help="print parameters, memory, steps, traffic between processes and bits of these settings, and train nothing",
    )
    parser.add_argument(
        "--help-bottleneck",
        action=_InPlaceOf,
        metavar="NAME",
        other=out,
        help="print the options of a bottleneck, and train nothing",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the latest checkpoint in --out, with its settings; --steps may be more, and --data where"
        " the same files are now",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --resume and more --steps: change the model of a finished run although its prior, and files that"
        " were coded with it, are lost",
    )
    presets = [preset for name in NAMES for preset in config_of(name).presets]
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings that replace the defaults; other options come before them: {', '.join(presets)}",
    )
    parser.add_argument(
        "--modality",
        choices=NAMES,
        help="what the model learns from, where a folder has files of several (default: by the endings of the files)",
    )
    add_config(parser)
    add_logger(parser)
    add_settings(parser, *map(config_of, NAMES))
    parser.epilog = (
        "Further options are those of the bottleneck, such as --num-quantizers 8 beside --bottleneck rvq, or --levels"
        " 8,5,5,5 beside --bottleneck fsq: --help-bottleneck NAME lists them."
    )


class _InPlaceOf(argparse.Action):
    """Option that stores its value, or that of `const`, and makes another one optional.

    Args:
        other: that one.
        arguments: those of an action.
    """

    def __init__(self, *, other: argparse.Action, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.other = other

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        self.other.required = False
        setattr(namespace, self.dest, values or self.const)


def take_more_options(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """Keep the options of the bottleneck, which no parser knows, and return the other arguments."""
    options.bottleneck_arguments, others = take_named(arguments)
    return others


def run(options: argparse.Namespace) -> int:
    """Train, and draw the pictures of the run."""
    from fastvq.data.examples import describe
    from fastvq.data.registry import check_outside
    from fastvq.errors import counted
    from fastvq.files import exclusive
    from fastvq.runs.outputs import check_no_other_files
    from fastvq.runs.page import PAGE
    from fastvq.runs.pictures import failures_as_warnings, picture_reconstructions, picture_run
    from fastvq.runs.run_page import write_run_page
    from fastvq.training import Evaluation, Trainer, load_examples, ranks
    from fastvq.training.checkpoint import load_latest
    from fastvq.training.loggers import check_logger
    from fastvq.training.loop import describe_resumed, usable_device

    check_logger(options.logger)
    if options.help_bottleneck is not None:
        from fastvq.models.bottlenecks import describe_options

        print("\n".join(describe_options(options.help_bottleneck)))
        return 0
    if options.out is None and options.resume:
        raise ConfigError("out: --resume needs the folder of the run")
    config = _settings(options)
    _refuse_without_effect(options, config)
    if options.plan:
        from fastvq.training.plan import lines_of, plan_training

        print("\n".join(lines_of(plan_training(config))))
        return 0
    usable_device(config.device)  # before files are read
    if options.resume:
        latest = load_latest(options.out, tensors=False)
        print(describe_resumed(latest, config), flush=True)
        if latest.finished and config.steps > latest.step:
            _check_nothing_is_lost(options)
    examples = ranks.rank_0_first(lambda: load_examples(config, progress=ranks.leads()))
    if not options.resume:
        check_outside(options.out, config.data, "out")
        check_no_other_files(options.out)
    trainer = Trainer(config, examples, options.out, resume=options.resume)
    print(describe(examples))

    def draw(trainer: Trainer, evaluation: Evaluation) -> None:
        with failures_as_warnings("picture of reconstructions"):
            picture_reconstructions(trainer, evaluation, captioned=False)
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
    one, many = examples.noun
    held_out = counted(len(examples.test), f"held-out {one}", f"held-out {many}")
    print(f"{held_out}: {trainer.modality.measures[evaluation.measure].text(evaluation.value)}{perplexity}")
    if (options.out / PAGE).exists():
        print(f"pictures and settings: {options.out / PAGE}")
    return 0


def _check_nothing_is_lost(options: argparse.Namespace) -> None:
    """Raise a ConfigError if more steps of a finished run would make its priors useless, unless that is requested."""
    from fastvq.runs.contrast import CONTRASTIVE_FOLDER
    from fastvq.runs.load import PRIOR_FOLDER
    from fastvq.training.checkpoint import checkpoint_folders

    lost = {
        PRIOR_FOLDER: "its prior and the files that were coded with it",
        CONTRASTIVE_FOLDER: "its contrastive model",
    }
    found = [name for folder, name in lost.items() if checkpoint_folders(options.out / folder)]
    if found and not options.overwrite:
        raise ConfigError(
            f"steps: more steps change the model of {options.out}, so that {' and '.join(found)} are lost: copy the run"
            " first, and give --overwrite"
        )


def _settings(options: argparse.Namespace) -> TrainConfig:
    """Return the requested settings; those not given are the resumed run's own, or the defaults."""
    from fastvq.data import DATA_SETS
    from fastvq.modalities import NAMES, TrainConfig, config_of, plural, recognized
    from fastvq.training.checkpoint import load_latest

    given = given_settings(options, "train", *map(config_of, NAMES))
    own = load_latest(options.out).config if options.resume else None
    data = given.get("data", TrainConfig.data)
    if not isinstance(data, str):
        raise ConfigError(f"data must be a text, got {data!r}")
    modality = given.pop("modality", None) or (recognized(data) if own is None else own.modality)
    settings = config_of(modality)
    if own is not None and not isinstance(own, settings):
        raise ConfigError(f"modality: a resumed run keeps its settings, {own.modality}, got {modality}")
    if own is None and data in DATA_SETS and DATA_SETS[data].modality != modality:
        raise ConfigError(f"modality: {data} has {plural(DATA_SETS[data].modality)}, not {plural(modality)}")
    others = given.keys() - {field.name for field in dataclasses.fields(settings)}
    if others:
        raise ConfigError(f"{min(others)} is no setting of the modality {modality}")
    arguments = getattr(options, "bottleneck_arguments", {})
    if arguments:
        earlier = settings() if own is None else own
        bottleneck = given.get("bottleneck", earlier.bottleneck)
        kept = earlier.bottleneck_options if bottleneck == earlier.bottleneck else {}
        given["bottleneck_options"] = given.get("bottleneck_options", kept) | _bottleneck_options(bottleneck, arguments)
    if data in DATA_SETS:
        defaults = DATA_SETS[data].settings
    else:
        defaults = settings.of_folders
        # A run that is resumed from another working directory must find the same folder.
        given["data"] = str(Path(data).resolve())
    if own is None:
        refuse_without_effect(options, ("overwrite",), "without --resume: give another folder")
    else:
        if options.preset is not None:
            raise ConfigError(f"preset: a resumed run keeps its settings, got {options.preset}")
        return dataclasses.replace(own, **given)
    preset = options.preset or next(iter(settings.presets))
    if preset not in settings.presets:
        raise ConfigError(f"preset must be one of {', '.join(settings.presets)} for {plural(modality)}, got {preset}")
    return settings(**(defaults | settings.presets[preset] | given))


def _refuse_without_effect(options: argparse.Namespace, config: TrainConfig) -> None:
    """Raise a ConfigError if an option on the command line has no effect beside the others.

    A file of settings may have them: that of a run has all.
    """
    from fastvq.data import DATA_SETS
    from fastvq.models.bottlenecks import SHARED

    if config.data in DATA_SETS:
        refuse_without_effect(options, ("test_fraction", "skip_unreadable"), f"on the data set {config.data}")
    if config.bottleneck == "none":
        refuse_without_effect(options, tuple(SHARED), "on the bottleneck none")
    if not getattr(config, "perceptual_weight", 0):
        refuse_without_effect(options, ("perceptual_network",), "without a perceptual_weight")
    if not getattr(config, "adversarial_weight", 0):
        names = ("adversarial_start", "feature_weight", "discriminator_width", "discriminator_layers")
        refuse_without_effect(options, names, "without an adversarial_weight")
    elif (start := getattr(config, "adversarial_start", 0)) >= config.steps:
        raise ConfigError(f"adversarial_start must be below steps={config.steps}, got {start}")


def _bottleneck_options(name: str, given: dict[str, str]) -> dict[str, Any]:
    """Return the options of a bottleneck that is chosen by name, from texts.

    Raises:
        ConfigError: there is no such bottleneck, or it has no such option.
    """
    from fastvq.modalities import ImageConfig
    from fastvq.models.bottlenecks import KINDS, parse_options

    ImageConfig(bottleneck=name)
    known = KINDS[name].options()
    for option in given:
        if option not in known:
            has = "which has " + ", ".join("--" + one.replace("_", "-") for one in known) if known else "which has none"
            raise ConfigError(
                f"--{option.replace('_', '-')} is no option of fastvq train, nor one of --bottleneck {name}, {has}"
            )
    return parse_options(name, given)
