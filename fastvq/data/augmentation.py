"""Random flips, crops and shifts as pure functions of seed and step; each rank gets its part of a batch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.distributed import share, world_size

from .examples import to_device
from .order import generator_of


def flip_randomly(images: Tensor, step: int, *, seed: int) -> Tensor:
    """Return this rank's images or clips (B, ..., W) of a batch, each mirrored left to right with probability 1/2."""
    coins = torch.rand(len(images) * world_size(), generator=generator_of(seed, "flip", step)) < 0.5
    coins = coins[share(len(coins))]
    coins = to_device(coins, images.device).reshape(-1, *[1] * (images.dim() - 1))
    return torch.where(coins, images.flip(-1), images)


def crop_randomly(images: Tensor, step: int, *, height: int, width: int, seed: int) -> Tensor:
    """Return this rank's images (B, C, H, W) of a batch, cropped at random to (height, width), to all places alike."""
    generator, count = generator_of(seed, "crop", step), len(images) * world_size()
    tops = torch.randint(images.shape[-2] - height + 1, (count,), generator=generator)
    lefts = torch.randint(images.shape[-1] - width + 1, (count,), generator=generator)
    own = share(count)
    places = zip(images, tops[own].tolist(), lefts[own].tolist(), strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in places])


def shift_randomly(images: Tensor, step: int, *, most: int, seed: int, padding: str = "constant") -> Tensor:
    """Return this rank's images (B, C, H, W) of a batch, each moved by up to `most` pixels; for padding see `F.pad`."""
    padded = F.pad(images, [most] * 4, mode=padding)
    return crop_randomly(padded, step, height=images.shape[2], width=images.shape[3], seed=seed)


def crop_clips_randomly(clips: Tensor, step: int, *, length: int, seed: int) -> Tensor:
    """Return random parts (B, C, length) of this rank's clips (B, C, T) of a batch, from all places alike."""
    count = len(clips) * world_size()
    starts = torch.randint(clips.shape[-1] - length + 1, (count,), generator=generator_of(seed, "crop", step))
    places = zip(clips, starts[share(count)].tolist(), strict=True)
    return torch.stack([clip[:, start : start + length] for clip, start in places])
