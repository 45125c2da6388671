"""The data set and the untrained model of given settings."""

from __future__ import annotations

from pathlib import Path

import fastvq
from fastvq.data import Images, load_fashion_mnist, load_folder, load_full_fashion_mnist
from fastvq.models import VQVAE, Bottleneck, Decoder, Encoder, NoBottleneck

from .config import FULL_DATA, SHIPPED_DATA, TrainConfig


def load_images(config: TrainConfig) -> Images:
    """Return the data set that `config.data` names.

    Raises:
        DataError: the folder or the Debian package is missing, or a file is not an image.
    """
    if config.data == SHIPPED_DATA:
        return load_fashion_mnist()
    if config.data == FULL_DATA:
        return load_full_fashion_mnist()
    return load_folder(
        Path(config.data),
        image_size=config.image_size,
        grayscale=config.grayscale,
        test_fraction=config.test_fraction,
    )


def build_model(config: TrainConfig) -> VQVAE:
    """Return the untrained VQ-VAE of these settings, its weights drawn from torch's current random state."""
    channels = 1 if config.grayscale else 3
    sizes = {"width": config.width, "residual_width": config.residual_width}
    bottleneck: Bottleneck = NoBottleneck()
    if config.bottleneck == "vq":
        bottleneck = fastvq.VectorQuantize(
            config.dim,
            config.codebook_size,
            decay=config.decay,
            commitment_weight=config.commitment_weight,
            threshold_ema_dead_code=config.dead_code_threshold,
            kmeans_init=True,
            rotation_trick=config.rotation_trick,
        )
    return VQVAE(
        Encoder(channels, config.dim, residual_blocks=config.encoder_blocks, downsamples=config.downsamples, **sizes),
        bottleneck,
        Decoder(config.dim, channels, residual_blocks=config.decoder_blocks, upsamples=config.downsamples, **sizes),
    )
