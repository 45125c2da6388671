"""Images to train on: a Fashion-MNIST subset that ships with the package, or any folder of images."""

from __future__ import annotations

from fastvq.errors import DataError

from .fashion_mnist import load_fashion_mnist, load_full_fashion_mnist
from .folder import load_folder
from .images import Images
from .registry import DATA_SETS, DataSet

__all__ = [
    "DATA_SETS",
    "DataError",
    "DataSet",
    "Images",
    "load_fashion_mnist",
    "load_folder",
    "load_full_fashion_mnist",
]
