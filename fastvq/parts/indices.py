"""Indices that are given to be decoded: from a file, a model or a generator, so that they are checked first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NARROW = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32)
"""What indices may be stored in beside int32 and int64."""


def checked_indices(indices: Tensor, sizes: int | Sequence[int]) -> Tensor:
    """`indices` in int64, or int32 if they came so; -1 stands for no code.

    Args:
        indices: integers of any dtype.
        sizes: how many codes there are, K; or of each level, for indices (..., Q).

    Raises:
        TypeError: they aren't integers.
        IndexError: one lies outside [-1, K). Told for indices on the CPU and outside of compiled graphs only: elsewhere
            every call would wait for the device, and what comes out is undefined.
    """
    if indices.dtype in NARROW:
        indices = indices.long()
    elif indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: must be integers, got {indices.dtype}")
    if type(indices) is not Tensor or indices.device.type != "cpu" or torch.compiler.is_compiling():
        return indices
    if not indices.numel():
        return indices
    levels = [sizes] if isinstance(sizes, int) else sizes
    columns = indices.flatten()[:, None] if isinstance(sizes, int) else indices.flatten(0, -2)
    low, high = (found.tolist() for found in columns.aminmax(dim=0))
    for level, (least, most, size) in enumerate(zip(low, high, levels, strict=False)):
        if least < -1 or most >= size:
            where = "" if len(levels) == 1 else f" at level {level}"
            wrong = most if most >= size else least
            raise IndexError(f"indices: must lie in [-1, {size}){where}, got {wrong}")
    return indices
