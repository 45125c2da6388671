"""The data set and the untrained model of given settings."""

from __future__ import annotations

from pathlib import Path

from fastvq.data import DATA_SETS, DataError, Examples
from fastvq.data.registry import describe_choices
from fastvq.modalities import TrainConfig, modality_of
from fastvq.models import VQVAE
from fastvq.models.bottlenecks import SHARED, build_bottleneck


def load_examples(config: TrainConfig, *, progress: bool = False) -> Examples:
    """Return the data set that `config.data` names: one of `DATA_SETS`, or the files of a folder or of tar shards.

    Args:
        config: the settings.
        progress: show a progress bar on stderr while the files of a folder are decoded.

    Raises:
        DataError: there is neither a data set nor a folder of this name, files are missing, or one cannot be read.
    """
    if config.data in DATA_SETS:
        return DATA_SETS[config.data].load()
    root = Path(config.data)
    if not root.exists():
        raise DataError(f"{root} doesn't exist: data must be {describe_choices()}")
    return modality_of(config.modality).load(root, config, progress=progress)


def build_model(config: TrainConfig) -> VQVAE:
    """Return the untrained VQ-VAE of these settings, its weights drawn from torch's current random state.

    Raises:
        ConfigError: the bottleneck has no such option, an option has an invalid value, or the networks do not fit.
    """
    modality = modality_of(config.modality)
    shared = {name: getattr(config, name) for name in SHARED}
    bottleneck = modality.bottleneck(
        config,
        lambda grid: build_bottleneck(config.bottleneck, config.dim, grid, shared, config.bottleneck_options),
    )
    # Drawn after the bottleneck, as the runs that the documents show were.
    encoder, decoder = modality.networks(config)
    return VQVAE(encoder, bottleneck, decoder, value_range=modality.value_range)
