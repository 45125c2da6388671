"""Settings in TOML files: `--config FILE.toml`, and the config.toml that every run has."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any

from fastvq.errors import ConfigError
from fastvq.extras import require
from fastvq.files import StrPath
from fastvq.modalities.settings import Settings

NAME = "config.toml"
"""Name of the file in the folder of a run, and in that of its prior."""
SECTIONS = ("train", "prior", "contrast")
"""Tables that a file may be divided into, one for each command that reads it."""


def read_settings(path: StrPath, section: str, *settings: type[Settings]) -> dict[str, Any]:
    """Return the settings in a TOML file, {name: value}.

    Args:
        path: the file, with the settings of one command, or with a table of them for each command in `SECTIONS`.
        section: the command that reads them.
        settings: the records that they may belong to. Where these are of modalities, `modality` may be among them.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or holds something else than settings of this command.
    """
    path = Path(path)
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        content = toml.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"config: {path}: {error.strerror or error}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise ConfigError(f"config: {path} is no TOML file: {error}") from error
    if any(isinstance(content.get(name), dict) for name in SECTIONS):
        others = [name for name in content if name not in SECTIONS or not isinstance(content[name], dict)]
        if others:
            listed = ", ".join(f"[{name}]" for name in SECTIONS)
            raise ConfigError(f"config: {path} is divided into {listed}, but has {', '.join(others)} outside of them")
        content = content.get(section, {})
    known = list(dict.fromkeys(field.name for record in settings for field in dataclasses.fields(record)))
    if any(record.modality for record in settings):
        known.append("modality")
    given = {name.replace("-", "_"): value for name, value in content.items()}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f"perhaps {' or '.join(close)} is meant" if close else f"fastvq {section} --help lists them"
            raise ConfigError(f"config: {path} has {name!r}, which is no setting of fastvq {section}: {hint}")
    return given


def to_toml(config: Settings) -> str:
    """Return settings as a TOML file, each with its description; those that are None are left out."""
    lines, tables = [], []
    if config.modality:
        lines.append(f"modality = {_value(config.modality)}  # what the model learns from")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, dict):
            rows = [f"{json.dumps(name)} = {_value(own)}" for name, own in value.items()]
            tables += ["", f"[{field.name}]", *rows] if rows else []
        elif value is not None:
            description = " ".join(str(field.metadata.get("help", "")).split())
            lines.append(f"{field.name} = {_value(value)}" + (f"  # {description}" if description else ""))
    return "\n".join([*lines, *tables]) + "\n"


def _value(value: Any) -> str:
    """Return a value as TOML writes it: JSON's form, but for the names of what is not finite and for lists of them."""
    if isinstance(value, float) and not isinstance(value, bool):
        return repr(value)  # inf and nan included
    if isinstance(value, list):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    # JSON leaves the character DEL as it is, TOML does not.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
