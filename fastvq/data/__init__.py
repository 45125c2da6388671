"""Data to train on: data sets that ship with the package, or any folder of files.

Importing the package imports no torch: settings and help texts read the table of data sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvq.errors import DataError
from fastvq.extras import lazy_attributes

from .registry import DATA_SETS, DataSet

if TYPE_CHECKING:
    from .examples import Examples
    from .fashion_mnist import load_fashion_mnist, load_full_fashion_mnist
    from .folder import load_folder
    from .images import load_image_folder
    from .index_shards import IndexShards
else:
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "fashion_mnist": ("load_fashion_mnist", "load_full_fashion_mnist"),
            "examples": ("Examples",),
            "folder": ("load_folder",),
            "index_shards": ("IndexShards",),
            "images": ("load_image_folder",),
        },
    )

__all__ = [
    "DATA_SETS",
    "DataError",
    "DataSet",
    "Examples",
    "IndexShards",
    "load_fashion_mnist",
    "load_folder",
    "load_full_fashion_mnist",
    "load_image_folder",
]
