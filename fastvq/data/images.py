"""The representation of data sets that the trainer takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.errors import counted

_HASHED = 1 << 24
"""Bytes that are hashed at a time: a mapped data set may be larger than memory."""


@dataclass(frozen=True)
class Images:
    """A data set, split into images to learn from and images held out, in memory or mapped from a file.

    Attributes:
        name: name in reports and pictures.
        train, test: (N, C, H, W), uint8, 0 to 255.
        test_names: one name for each held-out image: its class, or its path inside the folder.
        train_labels, test_labels: (N,), int64, or None for images without classes.
        class_names: the name of each label, or None for images without classes.
        train_captions, test_captions: a text for each image, empty where it has none; None for images without captions.
        uncropped: (N, C, H', W'), the training images before they were cropped to `train`, to draw random crops from;
            None if they are not cropped.
        digest: fingerprint of images that are known already, see `fingerprint`.
    """

    name: str
    train: Tensor
    test: Tensor
    test_names: tuple[str, ...]
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    train_captions: tuple[str, ...] | None = None
    test_captions: tuple[str, ...] | None = None
    uncropped: Tensor | None = None
    digest: str | None = None

    def fingerprint(self) -> str:
        """Return a SHA-256 of all pixels: two runs with equal fingerprints used the same data."""
        return self.digest or digest_of(self.train, self.test)


def describe(images: Images) -> str:
    """Return name, size, classes and captions of a data set in one line."""
    parts = [f"{images.name}: {counted(len(images.train), 'training image')}", f"{len(images.test)} held out"]
    if images.class_names is not None:
        parts.append(counted(len(images.class_names), "class", "classes"))
    if images.train_captions is not None and images.test_captions is not None:
        captions = [*images.train_captions, *images.test_captions]
        without = captions.count("")
        parts.append("captions" + (f" ({without} of {len(captions)} have none)" if without else ""))
    return ", ".join(parts)


def digest_of(*splits: Tensor) -> str:
    """Return a SHA-256 of the shapes and pixels of some uint8 images (N, C, H, W)."""
    digest = hashlib.sha256()
    for images in splits:
        digest.update(repr(tuple(images.shape)).encode())
        for part in images.split(max(1, _HASHED // max(1, images[:1].numel()))):
            digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def central_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Return the central (height, width) of images (N, C, H, W), as a view."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32) / 255
