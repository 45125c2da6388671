"""Training of the network of features that ships with the package: `python -m fastvq.training.feature_network`.

It learns two things of 32x32 pictures from data in the package: what they show, one of the 124 emoji or of the 10
classes of Fashion-MNIST in random colors, and how they were distorted. The second makes it notice what reconstructions
lack: blurred ones have other features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.data.emoji_clips import load_emoji_clips
from fastvq.data.examples import to_float
from fastvq.data.fashion_mnist import load_fashion_mnist
from fastvq.extras import require, tracked
from fastvq.files import StrPath, whole
from fastvq.models.perceptual import WEIGHTS, FeatureNetwork

STEPS, BATCH, JUDGED, SEED = 800, 64, 1000, 0
_PEAK_RATE = 2e-3
_HELD_OUT = 4
"""Every fourth frame of a clip is held out."""
_SHIFT = 4
_DISTORTIONS = 6


class Pictures:
    """Emoji and clothes, 32x32 in color, with their classes.

    Args:
        held_out: the frames and clothes that are not learned from.
    """

    def __init__(self, *, held_out: bool) -> None:
        frames = load_emoji_clips().train.transpose(1, 2)  # [clips, T, 3, 32, 32]
        chosen = torch.arange(frames.shape[1]) % _HELD_OUT == _HELD_OUT - 1
        self.frames = frames[:, chosen if held_out else ~chosen]
        clothes = load_fashion_mnist()
        images, labels = (clothes.test, clothes.test_labels) if held_out else (clothes.train, clothes.train_labels)
        assert labels is not None
        self.clothes, self.labels = F.pad(images, (2, 2, 2, 2)), labels
        self.classes = len(frames) + int(labels.max()) + 1

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return random pictures (count, 3, 32, 32), their classes and their distortions (count,)."""
        half = count // 2
        clips = torch.randint(len(self.frames), (half,), generator=generator)
        times = torch.randint(self.frames.shape[1], (half,), generator=generator)
        rows = torch.randint(len(self.clothes), (count - half,), generator=generator)
        emoji, clothes = to_float(self.frames[clips, times]), to_float(self.clothes[rows])
        colors, background = torch.rand(2, len(rows), 3, 1, 1, generator=generator).unbind()
        pictures = torch.cat([emoji, colors * clothes + background * (1 - clothes)])
        pictures = _varied(pictures, generator)
        distortions = torch.randint(_DISTORTIONS, (count,), generator=generator)
        return (
            _distorted(pictures, distortions, generator),
            torch.cat([clips, len(self.frames) + self.labels[rows]]),
            distortions,
        )


def _varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures that are shifted, mirrored and tinted at random, with channels in a random order."""
    count, _, height, width = pictures.shape
    wide = F.pad(pictures, (_SHIFT,) * 4, mode="replicate")
    rows, columns = torch.randint(2 * _SHIFT + 1, (2, count), generator=generator).tolist()
    parts = zip(wide, rows, columns, strict=True)
    moved = torch.stack([one[:, row : row + height, column : column + width] for one, row, column in parts])
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    moved = torch.where(mirrored, moved.flip(-1), moved)[:, torch.randperm(3, generator=generator)]
    gain = 0.4 + 0.6 * torch.rand(count, 3, 1, 1, generator=generator)
    return moved * gain + (1 - gain) * torch.rand(count, 3, 1, 1, generator=generator)


def _distorted(pictures: Tensor, distortions: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures with distortion 0, none, to 5: blur, a strong blur, coarse pixels, noise, few levels."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strongly = F.avg_pool2d(F.pad(blurred, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    coarse = F.avg_pool2d(pictures, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    noisy = pictures + 0.08 * torch.randn(pictures.shape, generator=generator)
    posterized = (pictures * 5).round() / 5
    choices = torch.stack([pictures, blurred, strongly, coarse, noisy, posterized])
    return choices[distortions, torch.arange(len(pictures))]


class _Classifier(nn.Module):
    """The network with two heads, over the means of its features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = FeatureNetwork()
        self.heads = nn.ModuleList(nn.LazyLinear(size) for size in (classes, _DISTORTIONS))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        means = torch.cat([features.mean((2, 3)) for features in self.network(pictures)], 1)
        return [head(means) for head in self.heads]


def train_feature_network(
    out: StrPath = WEIGHTS, *, steps: int = STEPS, batch_size: int = BATCH, judged: int = JUDGED, seed: int = SEED
) -> dict[str, float]:
    """Train the network, write its weights in half precision, and return its shares of correct answers.

    Args:
        out: the file to write.
        steps: optimizer steps.
        batch_size: pictures per step.
        judged: held-out pictures that it is judged by.
        seed: seed of weights and pictures.

    Returns:
        "content" and "distortion" for held-out frames and clothes.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = Pictures(held_out=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Classifier(pictures.classes)
        model(torch.zeros(1, 3, 32, 32))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps + 1)
    for _ in tracked(range(steps), steps, "step"):
        x, *goals = pictures.batch(batch_size, generator)
        losses = [F.cross_entropy(found, goal) for found, goal in zip(model(x), goals, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, *goals = Pictures(held_out=True).batch(judged, torch.Generator().manual_seed(seed))
        shares = [
            (found.argmax(1) == goal).double().mean().item() for found, goal in zip(model.eval()(x), goals, strict=True)
        ]
    result = dict(zip(("content", "distortion"), shares, strict=True))
    weights = {name: value.half().contiguous() for name, value in model.network.state_dict().items()}
    with whole(out) as file:
        file.write(require("safetensors.torch").save(weights, {name: f"{share:.3f}" for name, share in result.items()}))
    return result


def main() -> None:
    """Train the network from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    for name, share in train_feature_network(options.out, steps=options.steps).items():
        print(f"{name}: {share:.1%} of {JUDGED} held-out pictures")


if __name__ == "__main__":
    main()
