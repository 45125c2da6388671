"""Images of three classes, for the tests of the demo."""

from __future__ import annotations

import torch

from ..cases import generator


def squares(count=90, channels=1):
    """Bright squares at the left, in the middle or at the right of noise."""
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, channels, 12, 12), generator=generator(), dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4:8, 4 * label : 4 * label + 4] += 190
    return images, labels
