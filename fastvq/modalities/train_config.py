"""Settings of a VQ-VAE and of its training that all modalities have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastvq.data import DATA_SETS
from fastvq.data.registry import describe_choices
from fastvq.errors import ConfigError

from . import config_of
from .settings import Settings, setting

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastvq.data.reader import Format

# The keys of `fastvq.models.bottlenecks.KINDS`.
BOTTLENECKS = (
    *("vq", "rvq", "grouped-rvq", "sim-vq", "residual-sim-vq", "fsq", "residual-fsq", "grouped-residual-fsq"),
    *("lfq", "residual-lfq", "grouped-residual-lfq", "ifsq", "fsp", "latent", "hierarchical", "ibq", "llamagen"),
    *("gsq", "factorized", "factorized-rvq", "split-rvq", "sq-vae", "gumbel", "vae", "none"),
)
_NO_BOTTLENECKS = {
    "random-projection": "it only returns indices, the targets of self-supervised learning: no codes to decode",
    "binary-mapper": "it samples bits from logits and returns one-hot vectors, not codes",
    "evo-lfq": "it contains an encoder and a decoder of its own",
    "strided-rvq": "it returns indices of several lengths, at strides in time",
    "sequential": "it is a sequence of modules around another quantizer",
}
"""Quantizers of the package that cannot stand between encoder and decoder, with the reason."""
PRECISIONS = ("float32", "bf16")


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
    # Without a limit the loss of color images and video rises again and again while the codebook forms.
    clip_norm: float | None = setting(1.0, "largest norm of the gradient, to which longer ones are scaled; 0: any")
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

    def check_example(self, names: Iterable[str], **others: Any) -> None:
        """Check the settings of an example of a data set that comes with fastvq, where they follow from it.

        Args:
            names: settings that have a value of the data set.
            others: the values of further ones.

        Raises:
            ConfigError: a setting has another value; the message names it.
        """
        known = DATA_SETS.get(self.data)
        if known is None:
            return
        for name, value in ({name: known.settings[name] for name in names} | others).items():
            if getattr(self, name) != value:
                fixed = "left out" if value is None else value
                given = getattr(self, name)
                raise ConfigError(f"{name} must be {fixed}, since {self.data} is {known.form}, got {given}")

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
