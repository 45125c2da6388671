"""Settings on the command line: one option for each field of a record of settings."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvq.training.config import Settings


def add_settings(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Make one option of each field, with its description as help; options not given leave no attribute behind."""
    group = parser.add_argument_group("settings")
    types = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        # An optional number is parsed as the number: None is what it is when it isn't given.
        of = next((part for part in typing.get_args(types[field.name]) if part is not type(None)), types[field.name])
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if of is bool else {"type": of}
        default = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']}{default}".replace("%", "%%"),
            **kind,
        )


def given_settings(options: argparse.Namespace, settings: type[Settings]) -> dict[str, Any]:
    """Return {name: value} of the fields whose option was given."""
    names = (field.name for field in dataclasses.fields(settings))
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
