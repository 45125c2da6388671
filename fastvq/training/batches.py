"""Which images a step sees: a pure function of the seed and the step, so that a resumed run sees the same ones."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a generator that is independent for every (seed, purpose, number)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "order", epoch))


def batch_rows(step: int, *, count: int, batch_size: int, seed: int) -> Tensor:
    """Return the rows (batch_size,) that step 0, 1, ... learns from.

    Every epoch is a fresh permutation of all `count` rows, cut into batches; the last, incomplete one is left out.

    Raises:
        ValueError: `batch_size` is larger than `count`.
    """
    if batch_size > count:
        raise ValueError(f"batch_size {batch_size} is more than the {count} training images")
    epoch, position = divmod(step, count // batch_size)
    return _epoch_order(seed, epoch, count)[position * batch_size : (position + 1) * batch_size]


def moved(batch: Tensor, device: torch.device) -> Tensor:
    """Return a batch on a device. From the CPU it gets there without waiting for what the device has still to do."""
    # The other way nothing would say when it has arrived.
    return batch.to(device, non_blocking=batch.device.type == "cpu")


def flip_some(images: Tensor, step: int, *, seed: int) -> Tensor:
    """Return images (B, C, H, W) with each mirrored left to right with probability 1/2."""
    coins = torch.rand(len(images), generator=_generator(seed, "flip", step)) < 0.5
    return torch.where(moved(coins, images.device)[:, None, None, None], images.flip(-1), images)
