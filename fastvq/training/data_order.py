"""Data order as a pure function of seed and step, so that a resumed run sees the same images."""

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
    """Return the rows (batch_size,) of the batch of step 0, 1, ...

    Every epoch is a fresh permutation of all `count` rows, cut into batches; the last, incomplete one is dropped.

    Raises:
        ValueError: `batch_size` is larger than `count`.
    """
    if batch_size > count:
        raise ValueError(f"batch_size must be at most {count}, the number of training samples, got {batch_size}")
    epoch, position = divmod(step, count // batch_size)
    return _epoch_order(seed, epoch, count)[position * batch_size : (position + 1) * batch_size]


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Return a batch on a device; a copy from the CPU does not wait for the work queued there."""
    # A non-blocking copy to the CPU would be read before it has arrived.
    return batch.to(device, non_blocking=batch.device.type == "cpu")


def flip_randomly(images: Tensor, step: int, *, seed: int) -> Tensor:
    """Return images (B, C, H, W), each mirrored left to right with probability 1/2."""
    coins = torch.rand(len(images), generator=_generator(seed, "flip", step)) < 0.5
    return torch.where(to_device(coins, images.device)[:, None, None, None], images.flip(-1), images)
