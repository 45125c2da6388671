"""The representation of data sets that the trainer takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """A data set in memory, split into images to learn from and images held out.

    Attributes:
        name: name in reports and pictures.
        train, test: (N, C, H, W), uint8, 0 to 255.
        train_labels, test_labels: (N,), int64, or None for images without classes.
        test_names: one name for each held-out image: its class, or its path inside the folder.
    """

    name: str
    train: Tensor
    test: Tensor
    test_names: tuple[str, ...]
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def fingerprint(self) -> str:
        """Return a SHA-256 of all pixels: two runs with equal fingerprints used the same data."""
        digest = hashlib.sha256()
        for images in (self.train, self.test):
            digest.update(repr(tuple(images.shape)).encode())
            digest.update(images.contiguous().numpy().tobytes())
        return digest.hexdigest()


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32) / 255
