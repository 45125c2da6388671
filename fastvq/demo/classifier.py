"""A judge of samples: a small classifier that learns from real images, and is asked which class a sample is of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.training.batches import batch_rows, flip_some

STEPS = 500
_BATCH = 64
_PEAK_RATE = 3e-3


class Classifier(nn.Module):
    """Images (B, C, H, W) in [0, 1] to logits (B, classes): three strided convolutions, then a mean and a line."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(3):
            layers += [
                nn.Conv2d(channels if stage == 0 else width << (stage - 1), width << stage, 3, stride=2, padding=1),
                nn.BatchNorm2d(width << stage),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width << 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def train_classifier(images: Images, *, steps: int = STEPS, seed: int = 0) -> Classifier:
    """A classifier of a data set's classes, in eval mode. Torch's random state stays as it is.

    Raises:
        ValueError: the images have no classes.
    """
    if images.train_labels is None:
        raise ValueError("images: a classifier needs classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.train.shape[1], int(images.train_labels.max()) + 1)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps + 1)
        for step in range(steps):
            rows = batch_rows(step, count=len(images.train), batch_size=min(_BATCH, len(images.train)), seed=seed)
            x = flip_some(to_float(images.train[rows]), step, seed=seed)
            loss = F.cross_entropy(model(x), images.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def agreement(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, C, H, W) in [0, 1] whose likeliest class is the label (N,)."""
    hits = sum(
        int((model(part).argmax(1) == of).sum()) for part, of in zip(images.split(250), labels.split(250), strict=True)
    )
    return hits / max(1, len(images))
