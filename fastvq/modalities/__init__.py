"""Kinds of data that a VQ-VAE learns from: all that training, commands and pages need to know about each.

A modality NAME has two modules here: `NAME_config`, its settings, which import no torch, and `NAME`, whose `MODALITY`
ties together its files (`fastvq.data`), its networks and losses (`fastvq.models`), and how its examples are drawn and
written. `base` describes what a modality is, `settings` what a record of settings is; `train_config` has the settings
of all modalities.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastvq.errors import ConfigError, counted
from fastvq.extras import lazy_attributes

if TYPE_CHECKING:
    from fastvq.files import StrPath

    from .audio_config import AudioConfig
    from .base import Modality
    from .image_config import ImageConfig
    from .train_config import TrainConfig
    from .video_config import VideoConfig
else:
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "audio_config": ("AudioConfig",),
            "base": ("Modality",),
            "image_config": ("ImageConfig",),
            "train_config": ("TrainConfig",),
            "video_config": ("VideoConfig",),
        },
    )

__all__ = [
    "NAMES",
    "AudioConfig",
    "ImageConfig",
    "Modality",
    "TrainConfig",
    "VideoConfig",
    "config_of",
    "modality_of",
    "plural",
    "recognized",
]

NAMES = ("image", "video", "audio")
"""Modalities by name; where a folder holds nothing but files that several can read, the first of them takes these."""


def config_of(name: str) -> type[TrainConfig]:
    """Return the class of the settings of a modality.

    Raises:
        ConfigError: there is no such modality.
    """
    _check(name)
    module = importlib.import_module(f"{__name__}.{name}_config")
    found: type[TrainConfig] = getattr(module, f"{name.capitalize()}Config")
    return found


def modality_of(name: str) -> Modality:
    """Return a modality by its name.

    Raises:
        ConfigError: there is no such modality.
    """
    _check(name)
    found: Modality = importlib.import_module(f"{__name__}.{name}").MODALITY
    return found


def plural(name: str) -> str:
    """Return the word for data of a modality in a sentence: "images", "audio" or "video"."""
    return {"image": "images"}.get(name, name)


def _check(name: object) -> None:
    if name not in NAMES:
        raise ConfigError(f"modality must be one of {', '.join(NAMES)}, got {name!r}")


def recognized(data: StrPath) -> str:
    """Return the name of the modality of a data set with a name, or of the files in a folder or in tar shards.

    A folder without any such file, or that does not exist, counts as one of images.

    Raises:
        ConfigError: the folder holds files of several modalities.
    """
    from fastvq.data import DATA_SETS
    from fastvq.data.source import suffixes_in

    if str(data) in DATA_SETS:
        return DATA_SETS[str(data)].modality
    endings = suffixes_in(data)
    readers = {name: modality_of(name).reader.suffixes for name in NAMES}
    able = {ending: [name for name in NAMES if ending in readers[name]] for ending in endings}
    found: dict[str, int] = {}
    # What one modality alone can read decides what the files are that several can.
    for ending in sorted(endings, key=lambda ending: len(able[ending])):
        if able[ending]:
            name = next((name for name in able[ending] if name in found), able[ending][0])
            found[name] = found.get(name, 0) + endings[ending]
    if len(found) > 1:
        files = " and ".join(counted(found[name], f"{name} file") for name in NAMES if name in found)
        raise ConfigError(f"modality: {data} holds {files}: say which the model learns from")
    return next(iter(found), NAMES[0])
