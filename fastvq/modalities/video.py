"""Clips of video."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.data import Examples
from fastvq.data.augmentation import flip_randomly
from fastvq.data.examples import to_device, to_float
from fastvq.data.video_io import CLIPS, write_video
from fastvq.errors import ConfigError
from fastvq.files import StrPath
from fastvq.models import VideoDecoder, VideoEncoder

from .base import Distance, Measure, Measures, Modality, PerExample
from .image import PixelObjective
from .image_measures import image_measures
from .video_config import VideoConfig

MEASURES = {
    "psnr_db": Measure("PSNR of the mean squared error (dB)", 2, unit=" dB", brief=1),
    "psnr_db_mean": Measure("PSNR, mean over frames (dB)", 2, unit=" dB"),
    "ssim": Measure("SSIM, mean over frames"),
    "ms_ssim": Measure("MS-SSIM, mean over frames"),
    "lpips": Measure("LPIPS (AlexNet), mean over frames"),
    "rfid": Measure("rFID of frames", 2),
}
_SHOWN = 5
"""Number of frames of a clip in a picture."""
_GAP, _ASPECT = 2, 2.0
"""Pixels around a clip, and width over height, of an animation of several clips."""


class Clips(Modality):
    """Clips of video of one length and size, in gray or in color."""

    name = "video"
    reader = CLIPS
    measures = MEASURES
    usual_ending = "webp"
    first_half = "first frames"
    played = CLIPS.written

    def networks(self, config: VideoConfig) -> tuple[nn.Module, nn.Module]:
        channels, network = config.example_format.shape[0], config.network()
        try:
            encoder = VideoEncoder(
                channels,
                config.dim,
                residual_blocks=config.encoder_blocks,
                downsamples=config.downsamples,
                time_downsamples=config.time_downsamples,
                **network,
            )
            decoder = VideoDecoder(
                config.dim,
                channels,
                residual_blocks=config.decoder_blocks,
                upsamples=config.downsamples,
                time_upsamples=config.time_downsamples,
                **network,
            )
        except ValueError as error:
            raise ConfigError(re.sub("^groups", "norm_groups", str(error))) from error
        return encoder, decoder

    def objective(self, config: VideoConfig) -> PixelObjective:
        return PixelObjective(config.reconstruction_variance, l1=config.reconstruction_loss == "l1")

    def augmented(
        self, stored: Tensor, examples: Examples, config: VideoConfig, step: int, device: torch.device
    ) -> Tensor:
        x = to_float(to_device(stored, device))
        return flip_randomly(x, step, seed=config.seed) if config.flip else x

    def as_images(self, x: Tensor, config: VideoConfig) -> Tensor:
        """Return frames from the first to the last, evenly spread, side by side."""
        frames = x.shape[2]
        shown = torch.linspace(0, frames - 1, min(frames, _SHOWN)).round().long()
        return x[:, :, shown].movedim(2, 3).flatten(3)

    def measures_of(self, config: VideoConfig, count: int, device: torch.device, *, download: bool = False) -> Measures:
        size = config.example_format
        taken = image_measures((size.height, size.width), count * size.frames, device, download=download)
        per_example = {name: _over_frames(measure) for name, measure in taken.per_example.items()}
        distances = {name: _OfFrames(distance) for name, distance in taken.distances.items()}
        return Measures(per_example, {**distances}, taken.refused)

    def seconds(self, config: VideoConfig) -> float:
        return config.frames / config.frame_rate

    def write(self, path: StrPath | BinaryIO, x: Tensor, config: VideoConfig, ending: str) -> None:
        write_video(path, x, config.frame_rate, ending)

    def play(self, path: StrPath | BinaryIO, signals: Mapping[str, Tensor], config: VideoConfig, ending: str) -> None:
        write_video(path, _tiled(list(signals.values())), config.frame_rate, ending)


def _tiled(groups: Sequence[Tensor]) -> Tensor:
    """Return clips (N, C, T, H, W) of several groups as one (C, T, h, w): those of one number below each other."""
    cells = torch.cat([F.pad(x, (_GAP, _GAP, _GAP, 0), value=0.5) for x in groups], 3)
    cells = F.pad(cells, (0, 0, 0, _GAP), value=0.5)
    height, width = cells.shape[3:]
    columns = min(len(cells), max(1, round(math.sqrt(_ASPECT * len(cells) * height / width))))
    rows = -(-len(cells) // columns)
    blank = torch.full_like(cells[:1], 0.5).expand(rows * columns - len(cells), *cells.shape[1:])
    table = torch.cat([cells, blank]).unflatten(0, (rows, columns))  # [rows, columns, C, T, h, w]
    return table.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)


def frames_of(x: Tensor) -> Tensor:
    """Return clips (B, C, T, H, W) as images (B T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def _over_frames(measure: PerExample) -> PerExample:
    """Return the mean of a measure of images over the frames of each clip."""

    def mean(restored: Tensor, originals: Tensor) -> Tensor:
        return measure(frames_of(restored), frames_of(originals)).unflatten(0, (len(originals), -1)).mean(1)

    return mean


class _OfFrames:
    """Distance of images, taken of all frames."""

    def __init__(self, distance: Distance) -> None:
        self.distance = distance

    def update(self, restored: Tensor, originals: Tensor) -> None:
        self.distance.update(frames_of(restored), frames_of(originals))

    def result(self) -> float:
        return self.distance.result()


MODALITY = Clips()
