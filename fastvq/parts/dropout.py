"""Quantize dropout and nested dropout: in training, some stages or levels are left out."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import distributed


def kept_levels(levels: int, *, cutoff_index: int = 0, multiple_of: int = 1, seed: int | None = None) -> int:
    """How many of the first levels are kept this time, in [cutoff_index + 1, levels].

        last ~ U{cutoff_index, ..., levels - 1},   kept = min(ceil((last + 1) / multiple_of) multiple_of, levels)

    Args:
        levels: Q.
        cutoff_index: the first level that may be the last.
        multiple_of: the number is rounded up to a multiple of it.
        seed: decides, where given; by default a new one is drawn by `draw_seed`.

    Source: Zeghidour et al., SoundStream, 2021, section III-C; Défossez et al., EnCodec, 2022, for the multiple.
    """
    last = random.Random(draw_seed() if seed is None else seed).randrange(cutoff_index, levels)
    return min(math.ceil((last + 1) / multiple_of) * multiple_of, levels)


def draw_seed() -> int:
    """A seed for `kept_levels`, in [0, 10000): from torch's generator on the CPU, or one that all ranks share."""
    return distributed.common_seed(10_000)


def common_seed(x: Tensor) -> int | Tensor:
    """`draw_seed` for several quantizers that are to keep the same levels: in a compiled graph as a tensor ()."""
    return _draw_seed(x) if torch.compiler.is_compiling() else draw_seed()


class Kept(NamedTuple):
    """Which levels of a residual quantizer take part, as `QuantizeDropout.draw` decided.

    In eager mode the host knows the number, and a level that `drops` need not be computed. In a compiled graph, which
    can't branch on a random number, every level is computed and `mask` takes back those left out.
    """

    levels: int | Tensor

    def drops(self, level: int) -> bool:
        """Whether it is known already that this level is left out."""
        return isinstance(self.levels, int) and level >= self.levels

    def mask(self, level: int, value: Tensor, fill: float) -> Tensor:
        """value if the level is kept, else `fill` everywhere: -1 for indices, 0 for losses and codes."""
        if isinstance(self.levels, int):
            return torch.full_like(value, fill) if level >= self.levels else value
        return torch.where(self.levels > level, value, fill)

    def rows(self, level: int, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The mask of this level's rows x (..., D): `mask` (...) or None, and no row at all if it is left out."""
        if isinstance(self.levels, int):
            return mask
        kept = (self.levels > level).expand(x.shape[:-1])
        return kept if mask is None else kept & mask


class QuantizeDropout(NamedTuple):
    """The settings of quantize dropout; see `kept_levels`."""

    levels: int
    enabled: bool = False
    cutoff_index: int = 0
    multiple_of: int = 1

    def check(self) -> QuantizeDropout:
        """Itself, if these settings can be.

        Raises:
            ValueError: they can't.
        """
        if not 0 <= self.cutoff_index < self.levels:
            raise ValueError(f"quantize_dropout_cutoff_index: must lie in [0, {self.levels}), got {self.cutoff_index}")
        if self.multiple_of < 1:
            raise ValueError(f"quantize_dropout_multiple_of: must be at least 1, got {self.multiple_of}")
        return self

    def draw(self, training: bool, x: Tensor, seed: int | Tensor | None = None) -> Kept:
        """This call's levels: all of them in eval, where dropout is off and for a single level. x gives the device."""
        if not (training and self.enabled and self.levels > 1):
            return Kept(self.levels)
        if torch.compiler.is_compiling():
            seed = torch.tensor(seed) if isinstance(seed, int) else seed
            return Kept(_kept_levels(x, self.levels, self.cutoff_index, self.multiple_of, seed))
        seed = None if seed is None else int(seed)
        return Kept(kept_levels(self.levels, cutoff_index=self.cutoff_index, multiple_of=self.multiple_of, seed=seed))


# Ops, since neither Python's generator nor a number on the host can be traced: a compiled graph asks at run time, and
# decides as eager mode does.
@torch.library.custom_op("fastvq::kept_levels", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _kept_levels(x: Tensor, levels: int, cutoff_index: int, multiple_of: int, seed: Tensor | None) -> Tensor:
    """`kept_levels` as a tensor () on x's device; the seed is on the CPU."""
    given = None if seed is None else int(seed)
    kept = kept_levels(levels, cutoff_index=cutoff_index, multiple_of=multiple_of, seed=given)
    return torch.tensor(kept, device=x.device)


@_kept_levels.register_fake
def _(x: Tensor, levels: int, cutoff_index: int, multiple_of: int, seed: Tensor | None) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("fastvq::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_seed(x: Tensor) -> Tensor:
    """`draw_seed` as a tensor () on the CPU."""
    return torch.tensor(draw_seed())


@_draw_seed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64)


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
