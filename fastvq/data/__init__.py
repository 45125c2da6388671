"""Images to train on: a Fashion-MNIST subset that ships with the package, or any folder of images."""

from __future__ import annotations

from fastvq.data.fashion_mnist import load_fashion_mnist, load_full_fashion_mnist
from fastvq.data.folder import load_folder
from fastvq.data.images import DataError, Images

__all__ = ["DataError", "Images", "load_fashion_mnist", "load_folder", "load_full_fashion_mnist"]
