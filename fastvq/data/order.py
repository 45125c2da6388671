"""Data order as a pure function of seed and step, so that a resumed run sees the same images."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvq.distributed import share, world_size
from fastvq.errors import ConfigError


def seed_of(seed: int, purpose: str, number: int) -> int:
    """Return a seed that is independent for every (seed, purpose, number)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a generator that is seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, number))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=generator_of(seed, "order", epoch))


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


def own_rows(step: int, *, count: int, batch_size: int, seed: int) -> Tensor:
    """Return this rank's part of `batch_rows`.

    Raises:
        ConfigError: the number of ranks does not divide the batch.
    """
    if batch_size % world_size():
        raise ConfigError(f"batch_size must be a multiple of {world_size()}, the number of processes, got {batch_size}")
    return batch_rows(step, count=count, batch_size=batch_size, seed=seed)[share(batch_size)]


class Batches:
    """Batches of images in the order of `batch_rows`, read ahead by worker processes on request.

    Args:
        images: (N, C, H, W), in memory or mapped from a file; only what a batch needs is read.
        batch_size, seed: see `batch_rows`. Of several ranks each has its share of a batch.
        workers: number of processes.
    """

    def __init__(self, images: Tensor, *, batch_size: int, seed: int, workers: int = 0) -> None:
        self._images, self._workers = images, workers
        self._order = partial(own_rows, count=len(images), batch_size=batch_size, seed=seed)
        self._next = -1
        self._ahead: Iterator[Tensor] = iter(())

    def __call__(self, step: int) -> Tensor:
        """Return the batch (batch_size, C, H, W) of step 0, 1, ..., or this rank's part of it."""
        if not self._workers:
            return self._images[self._order(step)]
        if step != self._next:
            loader = DataLoader(
                _Rows(self._images),
                batch_sampler=map(self._order, itertools.count(step)),  # type: ignore[arg-type]
                collate_fn=_unchanged,  # type: ignore[arg-type]
                num_workers=self._workers,
                # Torch's global random state is the training's.
                generator=torch.Generator(),
            )
            self._ahead = iter(loader)
        self._next = step + 1
        return next(self._ahead)


class _Rows(Dataset[Tensor]):
    """Images by their rows, a batch at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __getitems__(self, rows: Tensor) -> Tensor:
        return self.images[rows]


def _unchanged(batch: Tensor) -> Tensor:
    return batch
