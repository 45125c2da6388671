"""The data sets that have names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .fashion_mnist import load_fashion_mnist, load_full_fashion_mnist
from .images import Images


@dataclass(frozen=True)
class DataSet:
    """A data set that `fastvq train --data` takes by its name.

    Args:
        load: returns the images; raises a DataError that says what to install where files are missing.
        note: what the help text adds to the name.
        image_size: side of the square images, in pixels.
        grayscale: one channel instead of three.
    """

    load: Callable[[], Images]
    note: str
    image_size: int
    grayscale: bool


DATA_SETS = {
    "fashion-mnist": DataSet(load_fashion_mnist, "shipped subset", image_size=28, grayscale=True),
    "fashion-mnist-full": DataSet(load_full_fashion_mnist, "Debian's", image_size=28, grayscale=True),
}
"""Every data set by name, the default first; settings, command line and trainer take any other name for a folder."""


def describe_choices() -> str:
    """Return the names with their notes, and the folder, as a message or help text lists them."""
    return ", ".join(f"'{name}' ({data.note})" for name, data in DATA_SETS.items()) + " or a folder of images"
