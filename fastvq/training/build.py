"""The data set and the untrained model of given settings."""

from __future__ import annotations

import re
from pathlib import Path

from fastvq.data import DATA_SETS, DataError, Images, load_folder
from fastvq.data.registry import describe_choices
from fastvq.errors import ConfigError
from fastvq.models import VQVAE, Decoder, Encoder
from fastvq.models.bottlenecks import SHARED, build_bottleneck

from .config import TrainConfig


def load_images(config: TrainConfig, *, progress: bool = False) -> Images:
    """Return the data set that `config.data` names: one of `DATA_SETS`, or the images of a folder or of tar shards.

    Args:
        config: the settings.
        progress: show a progress bar on stderr while the images of a folder are decoded.

    Raises:
        DataError: there is neither a data set nor a folder of this name, files are missing, or one is not an image.
    """
    if config.data in DATA_SETS:
        return DATA_SETS[config.data].load()
    root = Path(config.data)
    if not root.exists():
        raise DataError(f"{root} doesn't exist: data must be {describe_choices()}")
    return load_folder(
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


def build_model(config: TrainConfig) -> VQVAE:
    """Return the untrained VQ-VAE of these settings, its weights drawn from torch's current random state.

    Raises:
        ConfigError: the bottleneck has no such option, an option has an invalid value, or a GroupNorm does not fit.
    """
    channels = 1 if config.grayscale else 3
    network = config.network()
    bottleneck = build_bottleneck(
        config.bottleneck,
        config.dim,
        config.feature_grid,
        {name: getattr(config, name) for name in SHARED},
        config.bottleneck_options,
    )
    # Drawn after the bottleneck, as the runs that the documents show were.
    try:
        encoder = Encoder(
            channels, config.dim, residual_blocks=config.encoder_blocks, downsamples=config.downsamples, **network
        )
        decoder = Decoder(
            config.dim, channels, residual_blocks=config.decoder_blocks, upsamples=config.downsamples, **network
        )
    except ValueError as error:
        raise ConfigError(re.sub("^groups", "norm_groups", str(error))) from error
    return VQVAE(encoder, bottleneck, decoder)
