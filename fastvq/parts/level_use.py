"""The health of a codebook that is a product of levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored

COUNTED = 2**18
"""The largest codebook whose codes are counted one by one."""


class _Dimension(Monitored, nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self._health = Health(levels)


class LevelUse(Monitored):
    """`Monitored` for a quantizer whose codes are products of levels: up to 2^18 codes are counted one by one, of a
    larger codebook the levels of each dimension, so that health has an axis for the dimensions."""

    def _count_levels(self, levels: Sequence[int], heads: int | None = None) -> None:
        """To be called in __init__. heads: of so many codebooks, each of these levels, for `Health`."""
        size = math.prod(levels)
        self._dimensions = nn.ModuleList() if size <= COUNTED else nn.ModuleList(_Dimension(count) for count in levels)
        if size <= COUNTED:
            self._health = Health(size, heads)

    @property
    def _monitored(self) -> list[Monitored] | None:
        return list(self._dimensions) or None  # type: ignore[arg-type]

    def _observe(self, indices: Tensor, levels: Tensor, counts: Tensor, error: Tensor | None) -> None:
        """Counts indices (...), or (H, ...), -1 for nothing; or levels (..., d) where counts, bool that broadcasts to
        (...), is True; with their mean squared error () where there is such a thing."""
        if not len(self._dimensions):
            self._health.observe_(indices.long(), error)
        for dimension, column in zip(self._dimensions, levels.unbind(-1), strict=False):
            cast(_Dimension, dimension)._health.observe_(column.long().masked_fill(~counts, -1), error)
