"""Options of the command line from a record of settings: one for each field."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvq.errors import DataError

if TYPE_CHECKING:
    from fastvq.training.config import Settings


def add_settings(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Add one option for each field, with its description as help; an option that is not given sets no attribute.

    A table of further options has none of its own: see `take_named`.
    """
    group = parser.add_argument_group("settings")
    types = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        # An optional number is parsed as a number; None stands for an option that is not given.
        parts = [part for part in typing.get_args(types[field.name]) if part is not type(None)]
        value_type = parts[0] if parts else types[field.name]
        if typing.get_origin(types[field.name]) is dict:
            continue
        kind: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if value_type is bool else {"type": value_type}
        )
        default = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']}{default}".replace("%", "%%"),
            **kind,
        )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config`."""
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        help="read settings from a file, such as the config.toml of a run; options on the command line come first",
    )


def add_logger(parser: argparse.ArgumentParser) -> None:
    """Add `--logger`."""
    parser.add_argument(
        "--logger",
        metavar="NAME",
        help="write the records to tensorboard, wandb or csv besides metrics.jsonl, or to none of them (default:"
        " tensorboard where it is installed)",
    )


def given_settings(options: argparse.Namespace, settings: type[Settings], section: str) -> dict[str, Any]:
    """Return {name: value} of the fields that `--config` has, and over them of those whose option is given.

    Raises:
        ConfigError: see `fastvq.training.config_file.read_settings`.
    """
    from fastvq.training.config_file import read_settings

    given = {} if options.config is None else read_settings(options.config, settings, section)
    names = (field.name for field in dataclasses.fields(settings))
    return given | {name: getattr(options, name) for name in names if hasattr(options, name)}


def take_named(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options among arguments that no parser knows, {name: text}, and the other arguments.

    `--name value`, `--name=value`; `--name` and `--no-name` alone are "true" and "false".
    """
    taken: dict[str, str] = {}
    others: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or not option[2:].replace("-", "_").isidentifier():
            others.append(argument)
            continue
        name = option[2:].replace("-", "_")
        if equals:
            taken[name] = value
        elif left and not left[0].startswith("--"):
            taken[name] = left.pop(0)
        elif name.startswith("no_"):
            taken[name.removeprefix("no_")] = "false"
        else:
            taken[name] = "true"
    return taken, others


def add_skip_unreadable(parser: argparse.ArgumentParser) -> None:
    """Add `--skip-unreadable`."""
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out image files that cannot be read, and name them"
    )


def check_sources(sources: Sequence[str], *, held_out: bool, data: str | None) -> None:
    """Raise a DataError if images are given beside `--held-out` or `--data`, or the former's name as an image."""
    if held_out and sources:
        raise DataError(f"held_out: takes no other images, got {', '.join(sources)}")
    if data is not None and sources:
        raise DataError(f"data: only says where held-out images are, has no effect on {', '.join(sources)}")
    if any(Path(source) == Path("held-out") for source in sources) and not Path("held-out").exists():
        raise DataError("held-out does not exist: the run's held-out images are --held-out")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the images of a run are."""
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="where the images that the run was trained on are now, if they have moved; others are refused",
    )
