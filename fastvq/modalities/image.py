"""Images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fastvq.data import Examples
from fastvq.data.augmentation import crop_randomly, flip_randomly
from fastvq.data.examples import to_device, to_float
from fastvq.data.image_io import IMAGES, write_image
from fastvq.data.images import load_image_folder
from fastvq.errors import ConfigError
from fastvq.files import StrPath
from fastvq.models import Decoder, Encoder, GridsBottleneck, halved_grids

from .base import Measure, Measures, Modality, Objective
from .image_config import ImageConfig
from .image_measures import image_measures

MEASURES = {
    "psnr_db": Measure("PSNR of the mean squared error (dB)", 2, unit=" dB", brief=1),
    "psnr_db_mean": Measure("PSNR, mean over images (dB)", 2, unit=" dB"),
    "ssim": Measure("SSIM"),
    "ms_ssim": Measure("MS-SSIM"),
    "lpips": Measure("LPIPS (AlexNet)"),
    "rfid": Measure("rFID", 2),
}


def psnr_db(mean_squared_error: float) -> float:
    """Return `-10 log10(mse)`, the PSNR in dB of signals with peak 1; infinite for an error of zero."""
    return -10 * math.log10(mean_squared_error) if mean_squared_error > 0 else math.inf


class PixelObjective(Objective):
    """`mean((y - x)^2) / variance`, or `mean|y - x| / sqrt(variance)` for l1; judged by the PSNR for a peak of 1.

    Args:
        variance: about the variance of the data.
        l1: take the absolute error.
    """

    measure = "psnr_db"

    def __init__(self, variance: float, *, l1: bool = False) -> None:
        super().__init__()
        self.variance, self.l1 = variance, l1

    def loss(self, restored: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        difference = restored - x
        squared_error = difference.square().mean()
        if self.l1:
            return difference.abs().mean() / math.sqrt(self.variance), squared_error
        return squared_error / self.variance, squared_error

    def errors(self, restored: Tensor, x: Tensor) -> Tensor:
        return (restored - x).square().flatten(1).mean(1, dtype=torch.float64)

    def value(self, error: float) -> float:
        return psnr_db(error)


class Images(Modality):
    """Images of one size, in gray or in color."""

    name = "image"
    reader = IMAGES
    measures = MEASURES
    usual_ending = "png"

    def load(self, root: StrPath, config: ImageConfig, *, progress: bool = False) -> Examples:
        return load_image_folder(
            root,
            image_size=config.image_size,
            image_width=config.image_width,
            grayscale=config.grayscale,
            fit=config.fit,
            crop_from=config.crop_from,
            test_fraction=config.test_fraction,
            skip_unreadable=config.skip_unreadable,
            workers=config.workers,
            progress=progress,
        )

    def networks(self, config: ImageConfig) -> tuple[nn.Module, nn.Module]:
        channels, network = config.example_format.shape[0], config.network()
        try:
            encoder = Encoder(
                channels, config.dim, residual_blocks=config.encoder_blocks, downsamples=config.downsamples, **network
            )
            decoder = Decoder(
                config.dim, channels, residual_blocks=config.decoder_blocks, upsamples=config.downsamples, **network
            )
        except ValueError as error:
            raise ConfigError(re.sub("^groups", "norm_groups", str(error))) from error
        return encoder, decoder

    def bottleneck(self, config: ImageConfig, build: Callable[[tuple[int, ...]], Any]) -> Any:
        if config.grids == 1:
            return build(config.feature_grid)
        try:
            return GridsBottleneck(
                config.dim,
                [build(grid) for grid in halved_grids(config.feature_grid, config.grids)],
                config.feature_grid,
                width=config.width,
                residual_width=config.residual_width,
                encoder_blocks=config.encoder_blocks,
                decoder_blocks=config.decoder_blocks,
                groups=config.norm_groups,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(re.sub("^groups", "norm_groups", str(error))) from error

    def objective(self, config: ImageConfig) -> PixelObjective:
        return PixelObjective(config.reconstruction_variance, l1=config.reconstruction_loss == "l1")

    def augmented(
        self, stored: Tensor, examples: Examples, config: ImageConfig, step: int, device: torch.device
    ) -> Tensor:
        if examples.uncropped is not None:
            height, width = examples.train.shape[-2:]
            stored = crop_randomly(stored, step, height=height, width=width, seed=config.seed)
        x = to_float(to_device(stored, device))
        return flip_randomly(x, step, seed=config.seed) if config.flip else x

    def as_images(self, x: Tensor, config: ImageConfig) -> Tensor:
        return x

    def measures_of(self, config: ImageConfig, count: int, device: torch.device, *, download: bool = False) -> Measures:
        size = config.example_format
        return image_measures((size.height, size.width), count, device, download=download)

    def write(self, path: StrPath | BinaryIO, x: Tensor, config: ImageConfig, ending: str) -> None:
        write_image(path, x, ending)


MODALITY = Images()
