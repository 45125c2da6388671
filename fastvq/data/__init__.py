"""Images to train on: a Fashion-MNIST subset that ships with the package, or any folder of images.

Importing the package imports no torch: settings and help texts read the table of data sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvq.errors import DataError
from fastvq.extras import lazy_attributes

from .registry import DATA_SETS, DataSet

if TYPE_CHECKING:
    from .fashion_mnist import load_fashion_mnist, load_full_fashion_mnist
    from .folder import load_folder
    from .images import Images
else:
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "fashion_mnist": ("load_fashion_mnist", "load_full_fashion_mnist"),
            "folder": ("load_folder",),
            "images": ("Images",),
        },
    )

__all__ = [
    "DATA_SETS",
    "DataError",
    "DataSet",
    "Images",
    "load_fashion_mnist",
    "load_folder",
    "load_full_fashion_mnist",
]
