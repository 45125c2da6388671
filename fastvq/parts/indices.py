"""Validation of indices, and packing of the levels of several dimensions into one index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq.precision import Unsaved, constant

from .arguments import check_tensors

LARGEST_INDEX = 2**63 - 1
STORAGE_DTYPES = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32)
"""Dtypes other than int32 and int64 that indices may be stored in."""


def checked_indices(indices: Tensor, sizes: int | Sequence[int]) -> Tensor:
    """Return `indices` as int64, or as int32 if they are int32; -1 is valid and stands for no code.

    Args:
        indices: integers of any dtype.
        sizes: K, the number of codes; or one number for each stage, for indices (..., Q).

    Raises:
        TypeError: the indices are no tensor, or not integers.
        IndexError: an index lies outside [-1, K). This is checked on the CPU and outside compiled graphs only:
            elsewhere every call would wait for the device. Unchecked invalid indices give undefined values.
    """
    check_tensors(indices=indices)
    if indices.dtype in STORAGE_DTYPES:
        indices = indices.long()
    elif indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: must be integers, got {indices.dtype}")
    if type(indices) is not Tensor or indices.device.type != "cpu" or torch.compiler.is_compiling():
        return indices
    if not indices.numel():
        return indices
    stages = [sizes] if isinstance(sizes, int) else sizes
    columns = indices.flatten()[:, None] if isinstance(sizes, int) else indices.flatten(0, -2)
    low, high = (found.tolist() for found in columns.aminmax(dim=0))
    for stage, (least, most, size) in enumerate(zip(low, high, stages, strict=False)):
        if least < -1 or most >= size:
            where = "" if len(stages) == 1 else f" at stage {stage}"
            wrong = most if most >= size else least
            raise IndexError(f"indices: must lie in [-1, {size}){where}, got {wrong}")
    return indices


def basis_of(levels: Sequence[int]) -> list[int]:
    """Return the place values (1, L_0, L_0 L_1, ...) of `levels`: the first dimension varies fastest."""
    return [math.prod(levels[:i]) for i in range(len(levels))]


def index_dtype(levels: Sequence[int]) -> torch.dtype:
    """Return int32 if it holds all indices, as in vector_quantize_pytorch, else int64."""
    return torch.int32 if math.prod(levels) <= 2**31 else torch.int64


def join_levels(levels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the indices (...) of levels (..., d), integers in [0, L_i), in `index_dtype`.

        index = sum_i level_i prod_{j<i} L_j

    Exact integer arithmetic, up to 2^63 codes.
    """
    *others, last = levels.to(index_dtype(sizes)).unbind(-1)
    for level, size in zip(reversed(others), reversed(sizes[:-1]), strict=True):
        last = last * size + level
    return last


def split_index(indices: Tensor, basis: Tensor, levels: Tensor) -> Tensor:
    """Return the levels (..., d) int64 of indices (...), the inverse of `join_levels`; -1 in every dimension for -1."""
    wide = indices.long().unsqueeze(-1)
    return ((wide // basis) % levels).masked_fill(wide < 0, -1)


def checked_levels(levels: Sequence[int], *, at_least: int) -> tuple[int, ...]:
    """Return `levels` as a tuple of Python integers, each at least `at_least`."""
    if isinstance(levels, int) or len(levels) == 0 or any(int(size) != size or size < at_least for size in levels):
        hint = "; preserve_symmetry=True takes 2" if at_least == 3 else ""
        raise ValueError(f"levels: must be a sequence of integers of at least {at_least}, got {levels}{hint}")
    return tuple(int(size) for size in levels)


class Radix(Unsaved):
    """Mixin, before nn.Module, of quantizers whose indices number the combinations of levels.

    Constants: _levels and _basis, (d,) int64.
    """

    _constants: tuple[str, ...] = ("_levels", "_basis")
    _levels: Tensor
    _basis: Tensor

    def _set_radix(self, levels: Sequence[int]) -> None:
        """Set the constants, in __init__. Place values beyond int64, which no index arithmetic uses, are zero."""
        basis = [value if value <= LARGEST_INDEX else 0 for value in basis_of(levels)]
        self._levels, self._basis = constant(levels, torch.int64), constant(basis, torch.int64)

    def _levels_of_indices(self, indices: Tensor) -> Tensor:
        """Return the levels (..., d) int64 of indices (...), as `split_index` does."""
        self.follow_(indices.device)
        return split_index(indices, self._basis, self._levels)
