"""Options of the command line from a record of settings: one for each field."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvq.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastvq.modalities.settings import Settings


def add_settings(parser: argparse.ArgumentParser, *settings: type[Settings]) -> None:
    """Add one option for each field, with its description as help; an option that is not given sets no attribute.

    A table of further options has none of its own: see `take_named`. Of several records, those that several have come
    first, in a group of their own; defaults are those of the first one.
    """
    owners: dict[str, list[type[Settings]]] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    for record in settings:
        for field in dataclasses.fields(record):
            owners.setdefault(field.name, []).append(record)
            fields.setdefault(field.name, field)
    from fastvq.modalities import plural

    common = parser.add_argument_group("settings")
    groups = dict.fromkeys(settings, common)
    if len(settings) > 1:
        groups = {record: parser.add_argument_group(f"settings of {plural(record.modality)}") for record in settings}
    for name, field in fields.items():
        kind = typing.get_type_hints(owners[name][0])[name]
        # An optional number is parsed as a number; None stands for an option that is not given.
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        value_type = parts[0] if parts else kind
        if typing.get_origin(kind) is dict:
            continue
        parsing: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if value_type is bool else {"type": value_type}
        )
        default = "" if field.default is None else f" (default: {field.default})"
        group = groups[owners[name][0]] if len(owners[name]) == 1 else common
        group.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']}{default}".replace("%", "%%"),
            **parsing,
        )


SAMPLING = ("temperature", "top_k", "top_p", "guidance")
"""Options of `add_sampling`: arguments of `Prior.sample`."""


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options in `SAMPLING`; one that is not given sets no attribute."""
    parser.add_argument(
        "--temperature", type=float, default=argparse.SUPPRESS, help="below 1 for likelier samples (default: 1)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        default=argparse.SUPPRESS,
        help="sample from the K likeliest indices only (default: all)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=argparse.SUPPRESS,
        help="sample from the likeliest indices whose probabilities sum to P (default: 1)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=argparse.SUPPRESS,
        help="above 1 to favor the class or the text (default: 1)",
    )


def given_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options in `SAMPLING` that are given."""
    return {name: getattr(options, name) for name in SAMPLING if hasattr(options, name)}


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


def given_settings(options: argparse.Namespace, section: str, *settings: type[Settings]) -> dict[str, Any]:
    """Return {name: value} of the fields that `--config` has, and over them of those whose option is given.

    Args:
        options: the parsed options.
        section: the command.
        settings: the records that have the fields. Where they are of modalities, "modality" may be among the names.

    Raises:
        ConfigError: see `fastvq.training.config_file.read_settings`.
    """
    from fastvq.training.config_file import read_settings

    given = {} if options.config is None else read_settings(options.config, section, *settings)
    names = {field.name for record in settings for field in dataclasses.fields(record)} | {"modality"}
    return given | {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


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


def refuse_without_effect(options: argparse.Namespace, names: Sequence[str], where: str) -> None:
    """Raise a ConfigError if one of these options is given where it has no effect.

    Args:
        options: the parsed options.
        names: of options whose absence is None, False, or no attribute.
        where: the circumstance, such as "with --held-out".
    """
    for name in names:
        value = getattr(options, name, None)
        if value is not None and value is not False:
            raise ConfigError(f"{name}: has no effect {where}")


def add_skip_unreadable(parser: argparse.ArgumentParser) -> None:
    """Add `--skip-unreadable`."""
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out files that cannot be read, and name them"
    )


def check_sources(sources: Sequence[str], *, held_out: bool, data: str | None) -> None:
    """Raise a DataError if files are given beside `--held-out` or `--data`, or the former's name as a file."""
    if held_out and sources:
        raise DataError(f"held_out: takes no other files, got {', '.join(sources)}")
    if data is not None and sources:
        raise DataError(f"data: only says where held-out examples are, has no effect on {', '.join(sources)}")
    if any(Path(source) == Path("held-out") for source in sources) and not Path("held-out").exists():
        raise DataError("held-out does not exist: the run's held-out examples are --held-out")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the data of a run are."""
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="where the files that the run was trained on are now, if they have moved; others are refused",
    )
