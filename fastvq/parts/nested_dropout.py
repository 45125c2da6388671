"""Nested dropout: in training, the first levels alone, now and then."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import Kept, draw_seed


class NestedDropout(NamedTuple):
    """How many of the first levels are put out: all of them, or with `probability` so many:

        kept ~ U{least, ..., levels - 1}

    Source: Rippel et al., Learning Ordered Representations with Nested Dropout, 2014.
    """

    levels: int
    probability: float = 0.0
    least: int = 1

    def check(self) -> NestedDropout:
        """Itself, if these settings can be.

        Raises:
            ValueError: they can't.
        """
        if not 0 <= self.probability <= 1:
            raise ValueError(f"nested_dropout: must lie in [0, 1], got {self.probability}")
        if self.least < 1:
            raise ValueError(f"nested_dropout_min_levels: must be at least 1, got {self.least}")
        return self

    def draw(self, training: bool, x: Tensor) -> Kept:
        """This call's levels, in a compiled graph as a tensor on x's device. All of them in eval."""
        if not training or self.probability == 0 or self.least >= self.levels:
            return Kept(self.levels)
        if torch.compiler.is_compiling():
            return Kept(_nested_levels(x, self.levels, self.probability, self.least))
        return Kept(_draw(self.levels, self.probability, self.least))


def _draw(levels: int, probability: float, least: int) -> int:
    generator = random.Random(draw_seed())
    if generator.random() >= probability:
        return levels
    return generator.randrange(least - 1, levels - 1) + 1


# An op for the reason that `kept_levels` is one.
@torch.library.custom_op("fastvq::nested_levels", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _nested_levels(x: Tensor, levels: int, probability: float, least: int) -> Tensor:
    return torch.tensor(_draw(levels, probability, least), device=x.device)


@_nested_levels.register_fake
def _(x: Tensor, levels: int, probability: float, least: int) -> Tensor:
    return x.new_empty((), dtype=torch.int64)
