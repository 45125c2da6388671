"""The data sets that have names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvq.errors import ConfigError

if TYPE_CHECKING:
    from fastvq.files import StrPath

    from .images import Images


@dataclass(frozen=True)
class DataSet:
    """A data set that `fastvq train --data` takes by its name.

    Args:
        load: returns the images; raises a DataError that says what to install where files are missing. It imports what
            it needs when it is called: help texts read this table without torch.
        name: its name in reports and pictures, the same as that of the images.
        note: what the help text adds to the name.
        image_size: side of the square images, in pixels.
        grayscale: one channel instead of three.
    """

    load: Callable[[], Images]
    name: str
    note: str
    image_size: int
    grayscale: bool


def _shipped() -> Images:
    from .fashion_mnist import load_fashion_mnist

    return load_fashion_mnist()


def _full() -> Images:
    from .fashion_mnist import load_full_fashion_mnist

    return load_full_fashion_mnist()


SUBSET, FULL = "Fashion-MNIST subset", "Fashion-MNIST"
"""Names of the two in reports and pictures."""
DATA_SETS = {
    "fashion-mnist": DataSet(_shipped, SUBSET, "shipped subset", image_size=28, grayscale=True),
    "fashion-mnist-full": DataSet(_full, FULL, "Debian's", image_size=28, grayscale=True),
}
"""Every data set by name, the default first; settings, command line and trainer take any other name for a folder."""


def describe_choices() -> str:
    """Return the names with their notes, and the folder, as a message or help text lists them."""
    return ", ".join(f"'{name}' ({data.note})" for name, data in DATA_SETS.items()) + " or a folder of images"


def name_of(data: str) -> str:
    """Return the name in reports and pictures of the data set or folder that a setting `data` names."""
    return DATA_SETS[data].name if data in DATA_SETS else folder_name(data)


def check_outside(output: StrPath, data: str, name: str) -> None:
    """Raise a ConfigError if an output lies in the folder of images that a setting `data` names.

    There it would be taken for an image, so that the data differ from those that a run was trained on, or replace one.
    What is hidden in the folder is no image.

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
            f"{name}: {output} lies in {data}, whose images a run learns from: pictures there would change them; choose"
            " a place outside"
        )


def folder_name(root: StrPath) -> str:
    """Return the last part of a folder's path, which "." has as well."""
    return Path(root).resolve().name or str(root)
