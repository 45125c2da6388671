"""The data sets that have names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvq.errors import ConfigError

if TYPE_CHECKING:
    from fastvq.files import StrPath

    from .examples import Examples


@dataclass(frozen=True)
class DataSet:
    """A data set that `fastvq train --data` takes by its name.

    Args:
        load: returns the examples; raises a DataError that says what to install where files are missing. It imports
            what it needs when it is called: help texts read this table without torch.
        name: its name in reports and pictures, the same as that of the examples.
        note: what the help text adds to the name.
        form: what an example is, in a few words.
        settings: the settings of its modality that follow from it, by name.
        modality: what the examples are, see `fastvq.modalities`.
        count: numbers of examples to learn from and of examples held out.
        license: license of the data.
        missing: returns what has to be installed before it can be used; empty if nothing.
    """

    load: Callable[[], Examples]
    name: str
    note: str
    form: str
    settings: dict[str, Any]
    modality: str = "image"
    count: tuple[int, int] = (0, 0)
    license: str = "unknown"
    missing: Callable[[], str] = lambda: ""


def _shipped() -> Examples:
    from .fashion_mnist import load_fashion_mnist

    return load_fashion_mnist()


def _full() -> Examples:
    from .fashion_mnist import load_full_fashion_mnist

    return load_full_fashion_mnist()


def _digits() -> Examples:
    from .digits import load_digits

    return load_digits()


def _emoji_clips() -> Examples:
    from .emoji_clips import load_emoji_clips

    return load_emoji_clips()


def _noto_emoji() -> Examples:
    from .noto_emoji import load_noto_emoji

    return load_noto_emoji()


def _music_loops() -> Examples:
    from .music_loops import load_music_loops

    return load_music_loops()


def _music_phrases() -> Examples:
    from .music_loops import load_music_loops

    return load_music_loops(name=PHRASES, length=PHRASES_SETTINGS["clip_length"])


def _full_is_missing() -> str:
    return "" if FULL_FOLDER.is_dir() else "Debian's package dataset-fashion-mnist"


def _digits_are_missing() -> str:
    return "" if importlib.util.find_spec("sklearn") else "scikit-learn: pip install scikit-learn"


def _soundfile_is_missing() -> str:
    return "" if importlib.util.find_spec("soundfile") else 'soundfile: pip install "fastvq-torch[audio]"'


SUBSET, FULL, DIGITS = "Fashion-MNIST subset", "Fashion-MNIST", "handwritten digits"
EMOJI, LOOPS, PHRASES, NOTO = "animated emoji", "music loops", "music phrases", "Noto emoji"
"""Names in reports and pictures."""
FULL_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package of Fashion-MNIST."""
_FASHION: dict[str, Any] = {
    "form": "28x28 gray",
    "settings": {"image_size": 28, "grayscale": True},
    "license": "MIT",
}
LOOPS_SETTINGS: dict[str, Any] = {"sample_rate": 16000, "channels": 1, "clip_length": 20480}
PHRASES_SETTINGS = LOOPS_SETTINGS | {"clip_length": 64000}
DATA_SETS = {
    "fashion-mnist": DataSet(_shipped, SUBSET, "shipped subset", count=(5700, 1000), **_FASHION),
    "fashion-mnist-full": DataSet(_full, FULL, "Debian's", count=(60000, 10000), missing=_full_is_missing, **_FASHION),
    "digits": DataSet(
        _digits,
        DIGITS,
        "scikit-learn's, 8x8",
        form="8x8 gray",
        settings={"image_size": 8, "grayscale": True},
        count=(1500, 297),
        license="CC BY 4.0",
        missing=_digits_are_missing,
    ),
    "noto-emoji": DataSet(
        _noto_emoji,
        NOTO,
        "shipped, 32x32 with captions",
        form="32x32 color",
        settings={"image_size": 32, "grayscale": False},
        count=(1507, 175),
        license="Apache-2.0",
    ),
    "emoji-clips": DataSet(
        _emoji_clips,
        EMOJI,
        "shipped clips of 17 frames, 32x32",
        form="17 frames of 32x32 in color",
        settings={"frames": 17, "frame_size": 32, "grayscale": False, "frame_rate": 6.0},
        modality="video",
        count=(124, 10),
        license="MIT",
    ),
    "music-loops": DataSet(
        _music_loops,
        LOOPS,
        "shipped clips of 1.28 s",
        form="1.28 s in mono at 16 kHz",
        settings=LOOPS_SETTINGS,
        modality="audio",
        count=(242, 32),
        license="CC0",
        missing=_soundfile_is_missing,
    ),
    "music-phrases": DataSet(
        _music_phrases,
        PHRASES,
        "the same in clips of 4 s",
        form="4 s in mono at 16 kHz",
        settings=PHRASES_SETTINGS,
        modality="audio",
        count=(133, 20),
        license="CC0",
        missing=_soundfile_is_missing,
    ),
}
"""Every data set by name, the default first; settings, command line and trainer take any other name for a folder."""


def describe_choices() -> str:
    """Return the names with their notes, and the folder, as a message or help text lists them."""
    named = ", ".join(f"'{name}' ({data.note})" for name, data in DATA_SETS.items())
    return f"{named} or a folder of files or tar shards"


def name_of(data: str) -> str:
    """Return the name in reports and pictures of the data set or folder that a setting `data` names."""
    return DATA_SETS[data].name if data in DATA_SETS else folder_name(data)


def check_outside(output: StrPath, data: str, name: str) -> None:
    """Raise a ConfigError if an output lies in the folder of files that a setting `data` names.

    There it would be taken for one of them, so that the data differ from those that a run was trained on, or replace
    one. What is hidden in the folder is no such file.

    Args:
        output: the file or folder to write.
        data: a data set's name, which any output may be beside, or a folder.
        name: the argument that the output was given as.
    """
    if data in DATA_SETS:
        return
    root, path = Path(data).resolve(), Path(output).resolve()
    if path.is_relative_to(root) and not any(part.startswith(".") for part in path.relative_to(root).parts):
        raise ConfigError(
            f"{name}: {output} lies in {data}, whose files a run learns from: others there would change them; choose"
            " a place outside"
        )


def folder_name(root: StrPath) -> str:
    """Return the last part of a folder's path, which "." has as well."""
    return Path(root).resolve().name or str(root)
