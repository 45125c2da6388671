"""The representation of data sets that the trainer takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.errors import counted

_HASHED = 1 << 24
"""Bytes that are hashed at a time: a mapped data set may be larger than memory."""
_SCALES = {torch.uint8: 255.0, torch.int16: 32768.0}
"""Divisors that bring stored values to [0, 1], or [-1, 1)."""


@dataclass(frozen=True)
class Examples:
    """A data set, split into examples to learn from and examples held out, in memory or mapped from a file.

    An example is an image, or a clip of audio or of video.

    Attributes:
        name: name in reports and pictures.
        train, test: (N, C, *size): images (N, C, H, W) and video (N, C, T, H, W) as uint8, 0 to 255; audio (N, C, T) as
            int16.
        test_names: one name for each held-out example: its class, or its path inside the folder.
        train_labels, test_labels: (N,), int64, or None for examples without classes.
        class_names: the name of each label, or None for examples without classes.
        train_captions, test_captions: a text for each example, empty where it has none; None without captions.
        uncropped: (N, C, *size), the training examples before they were cropped to `train`, to draw random crops from;
            None if they are not cropped.
        digest: fingerprint of examples that are known already, see `fingerprint`.
        noun: the word for an example in messages, and its plural.
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
    noun: tuple[str, str] = ("image", "images")

    def fingerprint(self) -> str:
        """Return a SHA-256 of all values: two runs with equal fingerprints used the same data."""
        return self.digest or digest_of(self.train, self.test)


def describe(examples: Examples) -> str:
    """Return name, size, classes and captions of a data set in one line."""
    one, many = (f"training {noun}" for noun in examples.noun)
    parts = [f"{examples.name}: {counted(len(examples.train), one, many)}", f"{len(examples.test)} held out"]
    if examples.class_names is not None:
        parts.append(counted(len(examples.class_names), "class", "classes"))
    if examples.train_captions is not None and examples.test_captions is not None:
        captions = [*examples.train_captions, *examples.test_captions]
        without = captions.count("")
        parts.append("captions" + (f" ({without} of {len(captions)} have none)" if without else ""))
    return ", ".join(parts)


def digest_of(*splits: Tensor) -> str:
    """Return a SHA-256 of the shapes and values of stored examples (N, C, *size)."""
    digest = hashlib.sha256()
    for examples in splits:
        digest.update(repr(tuple(examples.shape)).encode())
        for part in examples.split(max(1, _HASHED // max(1, examples[:1].numel()))):
            digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def to_float(stored: Tensor) -> Tensor:
    """Return stored examples as float32: uint8 in [0, 1], int16 in [-1, 1)."""
    return stored.to(torch.float32) / _SCALES[stored.dtype]


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Return a batch on a device; a copy from the CPU does not wait for the work queued there."""
    # A non-blocking copy to the CPU would be read before it has arrived.
    return batch.to(device, non_blocking=batch.device.type == "cpu")
