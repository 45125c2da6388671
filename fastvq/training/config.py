"""Settings of training runs: frozen records that convert to JSON and back."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastvq.data import DATA_SETS
from fastvq.data.registry import describe_choices
from fastvq.errors import ConfigError
from fastvq.modalities import config_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastvq.data.reader import Format

# The keys of `fastvq.models.priors.PRIORS`, repeated so that reading settings imports no model.
PRIOR_KINDS = ("transformer", "pixelcnn", "lstm")
# Those of `fastvq.models.priors.transformer`.
PATTERNS = ("flat", "delay")
# The keys of `fastvq.models.bottlenecks.KINDS`.
BOTTLENECKS = (
    *("vq", "rvq", "grouped-rvq", "sim-vq", "residual-sim-vq", "fsq", "residual-fsq", "grouped-residual-fsq"),
    *(
        "lfq",
        "residual-lfq",
        "grouped-residual-lfq",
        "ifsq",
        "fsp",
        "latent",
        "hierarchical",
        "ibq",
        "llamagen",
        "gumbel",
        "vae",
        "none",
    ),
)
_NO_BOTTLENECKS = {
    "random-projection": "it only returns indices, the targets of self-supervised learning: no codes to decode",
    "binary-mapper": "it samples bits from logits and returns one-hot vectors, not codes",
    "evo-lfq": "it contains an encoder and a decoder of its own",
    "sequential": "it is a sequence of modules around another quantizer",
}
"""Quantizers of the package that cannot stand between encoder and decoder, with the reason."""


def setting(default: Any, description: str) -> Any:
    """Return a field whose description is also its help text on the command line."""
    return dataclasses.field(default=default, metadata={"help": description})


PRECISIONS = ("float32", "bf16")
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


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of a VQ-VAE and of its training: equal settings and equal data give equal weights.

    Each modality has a subclass with the settings of its data, its networks and its losses, such as
    `fastvq.modalities.ImageConfig`.

    Attributes:
        modality: the name of the modality.
        presets: settings that replace the defaults, by name; the first is the default.
        of_folders: settings that have other defaults for a folder of files.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    of_folders: ClassVar[dict[str, Any]] = {}

    data: str = setting(next(iter(DATA_SETS)), describe_choices())
    test_fraction: float = setting(0.1, "share of a folder's files to hold out")
    skip_unreadable: bool = setting(
        False, "leave out files of a folder that cannot be read, and name them; on for a folder of audio or video"
    )

    bottleneck: str = setting("vq", f"quantizer: {', '.join(BOTTLENECKS)}, vae and none have no indices")
    bottleneck_options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"help": "further arguments of the quantizer, by name"}
    )
    codebook_size: int = setting(512, "number of codes K")
    dim: int = setting(64, "length of a code vector D")
    decay: float = setting(0.99, "decay of the codebook's moving averages")
    commitment_weight: float = setting(0.25, "weight of the commitment loss")
    dead_code_threshold: float = setting(1.0, "a code used less often per batch, on average, is dead and replaced")
    rotation_trick: bool = setting(False, "rotate gradients through the bottleneck instead of copying them")

    steps: int = setting(3600, "optimizer steps")
    batch_size: int = setting(32, "examples per step")
    learning_rate: float = setting(3e-3, "peak learning rate of Adam")
    warmup_steps: int = setting(100, "steps of linear warm-up, before a cosine decay to zero")
    precision: str = setting("float32", "'float32', or 'bf16' for the networks' products; codes are found in float32")
    compile: bool = setting(False, "compile the model by torch.compile")
    accumulate: int = setting(1, "parts that a batch is learned from one after the other, which takes less memory")
    clip_norm: float | None = setting(
        None, "largest norm of the gradient, to which longer ones are scaled (default: any)"
    )
    weight_average: float = setting(
        0.0, "decay of a moving average of the weights, which is evaluated and loaded; 0: none"
    )
    seed: int = setting(0, "seed of weights, data order and replacement of dead codes")
    device: str = setting("cpu", "torch device to train on")
    workers: int | None = setting(None, "processes that decode and read data (default: cores to decode, 0 to read)")

    log_every: int = setting(20, "steps between training records in metrics.jsonl")
    evaluate_every: int = setting(500, "steps between evaluations on the held-out examples")
    checkpoint_every: int = setting(500, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.modality:
            raise TypeError("TrainConfig: take that of a modality, such as fastvq.modalities.ImageConfig")
        if self.bottleneck in _NO_BOTTLENECKS:
            raise ConfigError(f"bottleneck cannot be {self.bottleneck}: {_NO_BOTTLENECKS[self.bottleneck]}")
        if self.bottleneck not in BOTTLENECKS:
            raise ConfigError(f"bottleneck must be one of {', '.join(BOTTLENECKS)}, got {self.bottleneck!r}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate must divide batch_size {self.batch_size}, got {self.accumulate}")
        known = DATA_SETS.get(self.data)
        if known is not None and known.modality != self.modality:
            raise ConfigError(f"data: {self.data} is for the modality {known.modality}, not {self.modality}")

    @property
    def example_format(self) -> Format:
        """The form of an example: its size, and what else its values depend on."""
        raise NotImplementedError

    @property
    def feature_grid(self) -> tuple[int, ...]:
        """Shape of the grid of features of an example."""
        raise NotImplementedError

    @property
    def without_indices(self) -> str | None:
        """Message of a command that needs indices, after the name of a run that has none; None if the run has them."""
        if self.bottleneck == "none":
            return "was trained without a bottleneck: it has no indices"
        return "was trained with the bottleneck vae: it has no indices" if self.bottleneck == "vae" else None

    @property
    def mirrored(self) -> bool:
        """True if the model also learns from mirrored examples."""
        return False

    def to_json(self) -> dict[str, Any]:
        return {"modality": self.modality, **super().to_json()}

    @classmethod
    def from_json(cls, settings: Any) -> Self:
        """Return the settings of a JSON object; those of earlier versions, which name no modality, are of images.

        Raises:
            ConfigError: see `Settings.from_json`; or they are of another modality than this class.
        """
        if not isinstance(settings, dict):
            raise ConfigError(f"settings must be a JSON object, got {type(settings).__name__}")
        own = config_of(settings.get("modality", "image"))
        if not issubclass(own, cls):
            raise ConfigError(f"modality must be {cls.modality}, got {own.modality}")
        return super(TrainConfig, own).from_json({k: v for k, v in settings.items() if k != "modality"})

    def learning_rate_at(self, step: int) -> float:
        """Return `peak * min(1, (step + 1) / warmup) * (1 + cos(pi step / steps)) / 2` for step 0, 1, ..."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class PriorConfig(Settings):
    """Settings of a prior over indices and of its training."""

    kind: str = setting("transformer", f"one of {', '.join(PRIOR_KINDS)}")
    dim: int | None = setting(None, "width (default: the kind's own)")
    depth: int | None = setting(None, "blocks or layers (default: the kind's own)")
    heads: int = setting(4, "attention heads of the transformer, which divide its width")
    pattern: str = setting("flat", "order of several indices at a position: flat, or delay for the transformer")
    dropout: float = setting(0.1, "dropout rate of the layers")
    label_dropout: float = setting(0.1, "share of training samples without their label, which guidance needs")

    steps: int = setting(1400, "optimizer steps")
    batch_size: int = setting(48, "grids of indices per step")
    learning_rate: float = setting(3e-3, "peak learning rate of AdamW")
    warmup_steps: int = setting(50, "steps of linear warm-up, before a cosine decay to zero")
    weight_decay: float = setting(0.05, "weight decay of AdamW")
    seed: int = setting(0, "seed of weights, data order and dropout")
    device: str = setting("cpu", "torch device to train on")

    log_every: int = setting(20, "steps between training records in prior/metrics.jsonl")
    evaluate_every: int = setting(350, "steps between evaluations on the held-out indices")
    checkpoint_every: int = setting(350, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in PRIOR_KINDS:
            raise ConfigError(f"kind must be one of {', '.join(PRIOR_KINDS)}, got {self.kind!r}")
        if self.pattern not in PATTERNS:
            raise ConfigError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        if self.pattern != "flat" and self.kind != "transformer":
            raise ConfigError(f"pattern must be flat for a prior of kind {self.kind}, got {self.pattern!r}")

    def learning_rate_at(self, step: int) -> float:
        """Return `peak * (step + 1) / warmup` during warm-up, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, left)))

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments of a prior of this kind that do not depend on the data."""
        settings: dict[str, Any] = {"dropout": self.dropout, "label_dropout": self.label_dropout}
        settings |= {name: getattr(self, name) for name in ("dim", "depth") if getattr(self, name) is not None}
        return settings | ({"heads": self.heads, "pattern": self.pattern} if self.kind == "transformer" else {})


_SMALLEST = 1e-30
_BELOW_ONE = 1 - 1e-9
_FINITE = sys.float_info.max
SIDE, _DEPTH, _CODES, _COUNT = 2**16, 2**10, 2**24, 2**53
"""Largest width, depth, K, and number that a float holds exactly: more would end in a failed allocation or a hang."""
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("image_size", "image_width", "crop_from", "dim", "width", "residual_width", "heads"), (1, SIDE)),
    **dict.fromkeys(("frames", "frame_size", "frame_width", "kernel"), (1, SIDE)),
    **dict.fromkeys(("sample_rate", "clip_length", "crop_length"), (1, 2**31)),
    "channels": (1, 2),
    **dict.fromkeys(("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every"), (1, _COUNT)),
    **dict.fromkeys(("encoder_blocks", "decoder_blocks", "level_blocks"), (0, _DEPTH)),
    "norm_groups": (0, SIDE),
    "discriminator_width": (1, SIDE),
    "discriminator_layers": (1, 32),
    "adversarial_weight": (0, _FINITE),
    "adversarial_start": (0, _COUNT),
    **dict.fromkeys(("commitment_weight", "dead_code_threshold", "weight_decay"), (0, _FINITE)),
    **dict.fromkeys(("waveform_weight", "stft_weight", "mel_weight"), (0, _FINITE)),
    **dict.fromkeys(("learning_rate", "reconstruction_variance", "frame_rate"), (_SMALLEST, _FINITE)),
    "depth": (1, _DEPTH),
    "workers": (0, _DEPTH),
    "accumulate": (1, _COUNT),
    "clip_norm": (_SMALLEST, _FINITE),
    "weight_average": (0, _BELOW_ONE),
    "codebook_size": (1, _CODES),
    "warmup_steps": (0, _COUNT),
    **dict.fromkeys(("dropout", "label_dropout"), (0, _BELOW_ONE)),
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
