"""Mixed-radix numbers: one index for the levels of all dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

LARGEST_INDEX = 2**63 - 1


def basis_of(levels: Sequence[int]) -> list[int]:
    """The place values (1, L_0, L_0 L_1, ...) of `levels`: the first dimension counts fastest."""
    return [math.prod(levels[:i]) for i in range(len(levels))]


def index_dtype(levels: Sequence[int]) -> torch.dtype:
    """int32 where all indices fit it, as in vector_quantize_pytorch; else int64."""
    return torch.int32 if math.prod(levels) <= 2**31 else torch.int64


def join_levels(levels: Tensor, sizes: Sequence[int]) -> Tensor:
    """The indices (...) of levels (..., d), integers in [0, L_i), in `index_dtype`.

        index = sum_i level_i prod_{j<i} L_j

    Exact, in integers, up to 2^63 codes.
    """
    *others, last = levels.to(index_dtype(sizes)).unbind(-1)
    for level, size in zip(reversed(others), reversed(sizes[:-1]), strict=True):
        last = last * size + level
    return last


def split_index(indices: Tensor, basis: Tensor, levels: Tensor) -> Tensor:
    """The levels (..., d) int64 of indices (...), the inverse of `join_levels`; -1 in every dimension for -1."""
    wide = indices.long().unsqueeze(-1)
    return ((wide // basis) % levels).masked_fill(wide < 0, -1)


def checked_levels(levels: Sequence[int], *, at_least: int) -> tuple[int, ...]:
    """`levels` as a tuple of Python integers."""
    if isinstance(levels, int) or len(levels) == 0 or any(int(size) != size or size < at_least for size in levels):
        hint = "; preserve_symmetry=True takes 2" if at_least == 3 else ""
        raise ValueError(f"levels: must be a sequence of integers of at least {at_least}, got {levels}{hint}")
    return tuple(int(size) for size in levels)


def register_radix(module: nn.Module, levels: Sequence[int]) -> None:
    """Gives the module `_levels` and `_basis`, (d,) int64, which aren't saved. Without index arithmetic in int64 the
    place values may not fit: those that don't are zero."""
    basis = [value if value <= LARGEST_INDEX else 0 for value in basis_of(levels)]
    module.register_buffer("_levels", torch.tensor(levels, dtype=torch.int64), persistent=False)
    module.register_buffer("_basis", torch.tensor(basis, dtype=torch.int64), persistent=False)
