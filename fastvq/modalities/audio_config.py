"""Settings of a VQ-VAE of audio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from fastvq.data.audio_format import AudioFormat
from fastvq.errors import ConfigError

from .settings import setting
from .train_config import TrainConfig

NETWORKS = ("seanet", "transform")
ACTIVATIONS = ("elu", "snake")
"""Those of `fastvq.modalities.audio` and `fastvq.models.audio`, repeated so that reading settings imports no model."""
_STAGES: dict[str, Any] = {"num_quantizers": 8, "quantize_dropout": True, "quantize_dropout_per_item": True}
"""Options of the residual quantizer where none are given: a codec of 1 to 8 stages."""


@dataclass(frozen=True)
class AudioConfig(TrainConfig):
    """Settings of a codec of audio and of its training; see `TrainConfig`.

    The defaults are for the music loops of the package.
    """

    modality: ClassVar[str] = "audio"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "codec": {
            "network": "transform",
            "strides": "128",
            "width": 256,
            "dilations": "1,2",
            "kernel": 3,
            "batch_size": 16,
            "crop_length": 8192,
            "learning_rate": 1e-4,
            "steps": 250,
            "waveform_weight": 10.0,
            "stft_weight": 0.0,
            "adversarial_start": 100,
        },
        "seanet": {},
        "jukebox": {
            "network": "transform",
            "bottleneck": "vq",
            "strides": "32",
            "scale_strides": "4,4",
            "width": 256,
            "dilations": "1,2",
            "kernel": 3,
            "batch_size": 8,
            "crop_length": 16384,
            "learning_rate": 2e-4,
            "steps": 300,
            "waveform_weight": 10.0,
            "stft_weight": 0.0,
        },
    }
    of_folders: ClassVar[dict[str, Any]] = {"skip_unreadable": True}

    data: str = setting("music-loops", "a data set with a name, or a folder of files or tar shards")
    sample_rate: int = setting(16000, "samples per second, to which files of other rates are resampled")
    channels: int = setting(1, "1 for mono, to which stereo is mixed down, or 2 for stereo")
    clip_length: int = setting(20480, "samples of a clip, a multiple of the product of the strides")
    crop_length: int = setting(10240, "samples of the random part of a clip that is learned from at a time")

    bottleneck: str = setting("rvq", "quantizer, as for images; by default 8 residual stages, which dropout leaves out")
    codebook_size: int = setting(256, "number of codes K")
    decay: float = setting(0.95, "decay of the codebook's moving averages")
    dead_code_threshold: float = setting(0.1, "a code used less often per batch, on average, is dead and replaced")

    network: str = setting("seanet", f"kind of encoder and decoder: {', '.join(NETWORKS)}")
    width: int = setting(
        16, "channels of a seanet at the rate of the samples, doubled by each stride; those of a transform's blocks"
    )
    strides: str = setting(
        "2,4,5,8", "strides of a seanet, the first at the rate of the samples; their product is a transform's block"
    )
    scale_strides: str | None = setting(
        None, "strides from each of several separate autoencoders to the next coarser one, as 4,4 for three (Jukebox)"
    )
    dilations: str = setting("1", "dilations of the residual blocks, one block for each, at each rate of a seanet")
    kernel: int = setting(7, "width of the first and of the last convolution, and of those in a transform's blocks")
    activation: str = setting("elu", f"nonlinearity: {', '.join(ACTIVATIONS)}")

    waveform_weight: float = setting(1.0, "weight of the mean absolute difference of samples")
    stft_weight: float = setting(1.0, "weight of the multi-resolution STFT loss")
    mel_weight: float = setting(1.0, "weight of the multi-resolution mel loss")

    adversarial_weight: float = setting(0.0, "weight of the loss of a discriminator of spectrograms; 0 for none")
    feature_weight: float = setting(1.0, "weight of the difference of the discriminator's features")
    adversarial_start: int = setting(500, "step from which the discriminator and its losses take part")
    discriminator_width: int = setting(16, "channels of the discriminator")

    steps: int = setting(1000, "optimizer steps")
    batch_size: int = setting(8, "examples per step")
    learning_rate: float = setting(2e-3, "peak learning rate of Adam")
    clip_norm: float | None = setting(0.0, "largest norm of the gradient, to which longer ones are scaled; 0: any")

    def __post_init__(self) -> None:
        if self.bottleneck == "rvq" and self.bottleneck_options == {}:
            object.__setattr__(self, "bottleneck_options", dict(_STAGES))
        super().__post_init__()
        for name, choices in (("network", NETWORKS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        _numbers("dilations", self.dilations)
        for name in ("clip_length", "crop_length"):
            if getattr(self, name) % self.stride:
                raise ConfigError(
                    f"{name} must be a multiple of the product of the strides, {self.stride}, got {getattr(self, name)}"
                )
        if self.scale_strides is not None and self.without_indices:
            raise ConfigError(
                f"scale_strides must be left out for the bottleneck {self.bottleneck}, which has no indices, got"
                f" {self.scale_strides}"
            )
        if self.crop_length > self.clip_length:
            raise ConfigError(f"crop_length must be at most clip_length = {self.clip_length}, got {self.crop_length}")
        self.check_example(("sample_rate", "channels", "clip_length"))

    @property
    def example_format(self) -> AudioFormat:
        """Sample rate, channels and length of the clips."""
        return AudioFormat(self.sample_rate, self.channels, self.clip_length)

    @property
    def scales(self) -> list[tuple[int, ...]]:
        """The strides of each autoencoder, from the coarsest to the finest, which is the only one by default."""
        coarser = () if self.scale_strides is None else _numbers("scale_strides", self.scale_strides)
        strides = _numbers("strides", self.strides) + coarser
        return [strides[: len(strides) - less] for less in range(len(coarser) + 1)]

    @property
    def stride(self) -> int:
        """Number of samples for each index, of the coarsest scale."""
        return math.prod(self.scales[0])

    @property
    def feature_grids(self) -> list[tuple[int]]:
        """Number of features of a clip at each scale, from the coarsest to the finest."""
        return [(self.clip_length // math.prod(strides),) for strides in self.scales]

    @property
    def feature_grid(self) -> tuple[int]:
        """Number of features of a clip, at the finest scale."""
        return self.feature_grids[-1]

    def network_sizes(self) -> dict[str, Any]:
        """Return the arguments that encoders and decoders share, other than the strides."""
        return {
            "width": self.width,
            "dilations": _numbers("dilations", self.dilations),
            "kernel": self.kernel,
            "activation": self.activation,
        }


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Return the numbers in a text.

    Raises:
        ConfigError: they are no numbers of 1 to 1024, or more than 16.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 16 or not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise ConfigError(f"{name} must be numbers from 1 to 1024, such as 2,4,5,8, got {text!r}")
    return tuple(map(int, parts))
