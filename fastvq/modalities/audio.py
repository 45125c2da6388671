"""Clips of audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.data import Examples
from fastvq.data.audio_io import SOUNDS, write_audio
from fastvq.data.augmentation import crop_clips_randomly
from fastvq.data.examples import to_device, to_float
from fastvq.errors import ConfigError
from fastvq.files import StrPath, make_folder, whole
from fastvq.models import (
    AudioDecoder,
    AudioEncoder,
    JukeboxBottleneck,
    JukeboxDecoder,
    JukeboxEncoder,
    TransformDecoder,
    TransformEncoder,
)
from fastvq.models.spectral import log_mel, log_mel_distance, mel_loss, stft_loss

from .audio_config import AudioConfig
from .audio_measures import audio_measures
from .base import Measure, Measures, Modality, Objective

MEASURES = {
    "log_mel_db": Measure("log-mel distance (dB)", 2, word="a log-mel distance of", unit=" dB", brief=1),
    "si_sdr_db": Measure("SI-SDR, mean over clips (dB)", 2, unit=" dB"),
    "pesq_wide": Measure("PESQ, wide band at 16 kHz (MOS-LQO)", 2),
    "pesq_narrow": Measure("PESQ, narrow band at 8 kHz (MOS-LQO)", 2),
    "stoi": Measure("STOI at 10 kHz", 3),
    "visqol": Measure("ViSQOL, mode for audio at 48 kHz (MOS-LQO)", 2),
}
NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "seanet": (AudioEncoder, AudioDecoder),
    "transform": (TransformEncoder, TransformDecoder),
}
"""Encoder and decoder by the setting `network`."""
_RANGE_DB = 80.0
"""Range of levels in a spectrogram, below 0 dB."""
_PAUSE_S = 0.25
_PLAYED = 6
"""Number of clips for which a page has players."""


class SpectralLoss(Objective):
    """Weighted sum of differences of waveforms, of STFTs and of mel spectra; judged by the log-mel distance.

        waveform mean|y - x| + stft stft_loss(y, x) + mel mel_loss(y, x)

    Args:
        sample_rate: in Hz.
        waveform, stft, mel: the weights; see `fastvq.models.spectral` for the losses.
    """

    measure = "log_mel_db"

    def __init__(self, sample_rate: int, *, waveform: float, stft: float, mel: float) -> None:
        super().__init__()
        self.sample_rate, self.waveform, self.stft, self.mel = sample_rate, waveform, stft, mel

    def loss(self, restored: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        total = self.waveform * (restored - x).abs().mean()
        if self.stft:
            total = total + self.stft * stft_loss(restored, x)
        if self.mel:
            total = total + self.mel * mel_loss(restored, x, self.sample_rate)
        with torch.no_grad():
            return total, self.errors(restored, x).mean()

    def errors(self, restored: Tensor, x: Tensor) -> Tensor:
        return log_mel_distance(restored, x, self.sample_rate).mean(1, dtype=torch.float64)

    def value(self, error: float) -> float:
        return error


class Sounds(Modality):
    """Clips of audio of one rate and length, mono or stereo."""

    name = "audio"
    reader = SOUNDS
    value_range = (-1.0, 1.0)
    measures = MEASURES
    usual_ending = "flac"
    first_half = "first halves"
    played = SOUNDS.written

    def networks(self, config: AudioConfig) -> tuple[nn.Module, nn.Module]:
        sizes, (encoder, decoder) = config.network_sizes(), NETWORKS[config.network]
        encoders = [encoder(config.channels, config.dim, strides=strides, **sizes) for strides in config.scales]
        decoders = [decoder(config.dim, config.channels, strides=strides, **sizes) for strides in config.scales]
        if config.scale_strides is None:
            return encoders[0], decoders[0]
        return JukeboxEncoder(encoders), JukeboxDecoder(decoders)

    def bottleneck(self, config: AudioConfig, build: Callable[[tuple[int, ...]], Any]) -> Any:
        if config.scale_strides is None:
            return build(config.feature_grid)
        try:
            return JukeboxBottleneck(config.dim, [build(grid) for grid in config.feature_grids], config.feature_grids)
        except TypeError as error:
            raise ConfigError(str(error)) from error

    def objective(self, config: AudioConfig) -> SpectralLoss:
        return SpectralLoss(
            config.sample_rate, waveform=config.waveform_weight, stft=config.stft_weight, mel=config.mel_weight
        )

    def augmented(
        self, stored: Tensor, examples: Examples, config: AudioConfig, step: int, device: torch.device
    ) -> Tensor:
        """Return random parts of the clips."""
        parts = crop_clips_randomly(stored, step, length=config.crop_length, seed=config.seed)
        return to_float(to_device(parts, device))

    def as_images(self, x: Tensor, config: AudioConfig) -> Tensor:
        """Return log-mel spectrograms, high frequencies above; black is -80 dB, white 0 dB."""
        level = log_mel(x.mean(1), config.sample_rate)
        return (1 + level / _RANGE_DB).clamp(0, 1).flip(1)[:, None]

    def measures_of(self, config: AudioConfig, count: int, device: torch.device, *, download: bool = False) -> Measures:
        return audio_measures(config.sample_rate, config.clip_length)

    def seconds(self, config: AudioConfig) -> float:
        return config.clip_length / config.sample_rate

    def write(self, path: StrPath | BinaryIO, x: Tensor, config: AudioConfig, ending: str) -> None:
        write_audio(path, x, config.sample_rate, ending)

    def play(self, path: StrPath | BinaryIO, signals: Mapping[str, Tensor], config: AudioConfig, ending: str) -> None:
        """Write the signals one after the other, those that belong together first, with pauses between them."""
        pause = round(_PAUSE_S * config.sample_rate)
        together = torch.stack(list(signals.values()), 1)  # [N, signals, C, T]
        row = F.pad(together, (0, pause)).flatten(0, 1).transpose(0, 1).flatten(1)
        write_audio(path, row, config.sample_rate, ending)

    def write_media(self, folder: StrPath, name: str, signals: Mapping[str, Tensor], config: AudioConfig) -> None:
        """Write a file for each signal of the first clips."""
        make_folder(Path(folder))
        for what, clips in signals.items():
            for number, clip in enumerate(clips[:_PLAYED], 1):
                with whole(Path(folder) / f"{name}-{number}-{what}.{self.usual_ending}") as file:
                    self.write(file, clip, config, self.usual_ending)


MODALITY = Sounds()
