"""Settings of training runs: frozen records that convert to JSON and back."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastvq.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self


def setting(default: Any, description: str) -> Any:
    """Return a field whose description is also its help text on the command line."""
    return dataclasses.field(default=default, metadata={"help": description})


_RENAMED = {"revival_threshold": "dead_code_threshold"}
"""Settings by the name that earlier checkpoints have."""


@dataclass(frozen=True)
class Settings:
    """Base class of the settings of a training run: conversion to JSON and back, and validation of ranges.

    Each field carries its description as metadata; the command line derives its options from the fields. The annotated
    fields are those that `Loop` reads.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    modality: ClassVar[str] = ""
    """Name of the modality that the settings are of; empty for those of any."""

    if TYPE_CHECKING:
        steps: int
        seed: int
        log_every: int
        evaluate_every: int
        checkpoint_every: int

    def __post_init__(self) -> None:
        for name, kinds in _types(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if kinds == (str,) and isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif not _is_one_of(value, kinds):
                raise ConfigError(f"{name} must be {_describe_types(kinds)}, got {value!r}")
            if kinds == (dict,):
                object.__setattr__(self, name, _json_table(name, value))
        for name in _RANGES:
            value = getattr(self, name, None)
            if value is not None:
                check_range(name, value)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ..."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, settings: Any) -> Self:
        """Return the settings of a JSON object made by `to_json`.

        A missing setting takes its default: a file coded with a model must decode with every later version, and later
        versions may have more settings.

        Raises:
            ConfigError: a setting is unknown, of another type or out of range, or `settings` is no object.
        """
        if not isinstance(settings, dict):
            raise ConfigError(f"settings must be a JSON object, got {type(settings).__name__}")
        settings = {_RENAMED.get(name, name): value for name, value in settings.items()}
        unknown = settings.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"settings of another version of fastvq: {', '.join(sorted(unknown))}")
        return cls(**settings)

    def differences(self, other: Settings) -> dict[str, tuple[Any, Any]]:
        """Return {name: (value here, value in `other`)} of all settings that differ."""
        here, there = self.to_json(), other.to_json()
        names = dict.fromkeys([*here, *there])
        return {name: (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)}


_SMALLEST = 1e-30
_BELOW_ONE = 1 - 1e-9
_FINITE = sys.float_info.max
SIDE, _DEPTH, _CODES, _COUNT = 2**16, 2**10, 2**24, 2**53
"""Largest width, depth, K, and number that a float holds exactly: more would end in a failed allocation or a hang."""
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("image_size", "image_width", "crop_from", "dim", "width", "residual_width"), (1, SIDE)),
    **dict.fromkeys(("heads", "stage_dim"), (1, SIDE)),
    **dict.fromkeys(("frames", "frame_size", "frame_width", "kernel"), (1, SIDE)),
    **dict.fromkeys(("sample_rate", "clip_length", "crop_length"), (1, 2**31)),
    "channels": (1, 2),
    **dict.fromkeys(("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every"), (1, _COUNT)),
    **dict.fromkeys(("encoder_blocks", "decoder_blocks", "level_blocks"), (0, _DEPTH)),
    "norm_groups": (0, SIDE),
    "grids": (1, 3),
    "discriminator_width": (1, SIDE),
    "discriminator_layers": (1, 32),
    **dict.fromkeys(("adversarial_weight", "perceptual_weight"), (0, _FINITE)),
    "adversarial_start": (0, _COUNT),
    **dict.fromkeys(("commitment_weight", "dead_code_threshold", "weight_decay"), (0, _FINITE)),
    **dict.fromkeys(("waveform_weight", "stft_weight", "mel_weight", "feature_weight"), (0, _FINITE)),
    **dict.fromkeys(("learning_rate", "reconstruction_variance", "frame_rate"), (_SMALLEST, _FINITE)),
    **dict.fromkeys(("depth", "stage_depth"), (1, _DEPTH)),
    "workers": (0, _DEPTH),
    "accumulate": (1, _COUNT),
    "clip_norm": (0, _FINITE),
    "weight_average": (0, _BELOW_ONE),
    "codebook_size": (1, _CODES),
    "warmup_steps": (0, _COUNT),
    **dict.fromkeys(("dropout", "label_dropout", "corruption", "text_weight"), (0, _BELOW_ONE)),
    # One index for each byte, and three with a meaning of their own: see `fastvq.models.text`.
    "text_vocabulary": (259, _CODES),
    "text_length": (3, SIDE),
    "text_width": (4, SIDE),
    "text_depth": (1, _DEPTH),
    "shift": (0, SIDE),
    "test_fraction": (_SMALLEST, _BELOW_ONE),
    "downsamples": (1, 32),
    "time_downsamples": (0, 32),
    "decay": (0, 1),
    "seed": (0, 2**63 - 1),
}
"""Smallest and largest value of each numeric setting, whichever record has it."""


@functools.cache
def _types(settings: type[Settings]) -> dict[str, tuple[type, ...]]:
    """Return the types that each field of a record of settings may have."""
    hints = typing.get_type_hints(settings)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(settings)}
    return {
        name: (typing.get_origin(kind),) if typing.get_origin(kind) is dict else typing.get_args(kind) or (kind,)
        for name, kind in kinds.items()
    }


def _json_table(name: str, table: dict[Any, Any]) -> dict[str, Any]:
    """Return a copy of a table with the types that JSON has, so that it equals itself after reading.

    Raises:
        ConfigError: JSON has no such value.
    """
    try:
        copy = json.loads(json.dumps(table, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must hold numbers, texts and lists of them: {error}") from error
    return copy


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a value has one of these types; an integer is a float, but neither is a bool."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "a table"}


def _describe_types(kinds: tuple[type, ...]) -> str:
    return " or ".join("nothing" if kind is type(None) else _TYPE_NAMES[kind] for kind in kinds)


def check_range(name: str, value: float) -> None:
    """Raise a ConfigError if `value` is out of the range of the setting `name`."""
    low, high = _RANGES[name]
    if not low <= value <= high:
        raise ConfigError(f"{name} must be {_describe_range(low, high, value)}, got {value}")


def _describe_range(low: float, high: float, value: float) -> str:
    if high == _BELOW_ONE:
        return "between 0 and 1" if low == _SMALLEST else "at least 0 and below 1"
    if high == _FINITE and value > high:
        return "finite"
    if low == _SMALLEST:
        return "positive"
    if high in (SIDE, _DEPTH, _CODES, _COUNT):
        return f"at most {high}" if value > high else f"at least {low}"
    return f"at least {low}" if high == _FINITE else f"between {low} and {high}"
