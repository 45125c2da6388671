"""Quantize dropout and nested dropout: in training, the last stages are left out at random."""

from __future__ import annotations

import math
import random
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import distributed
from fastvq.precision import as_scalar

from .arguments import check_sizes


def draw_seed() -> int:
    """Draw a seed for `draw_stage_count`, in [0, 10000), from torch's generator on the CPU; all ranks share it."""
    return distributed.common_seed(10_000)


def common_seed(x: Tensor) -> int | Tensor:
    """Draw one seed for several quantizers that leave out the same stages; in a compiled graph, a tensor ()."""
    return _draw_seed(x) if torch.compiler.is_compiling() else draw_seed()


def draw_stage_count(stages: int, *, cutoff_index: int = 0, multiple_of: int = 1, seed: int | None = None) -> int:
    """Draw the number of leading stages that take part, in [cutoff_index + 1, stages].

        last ~ U{cutoff_index, ..., stages - 1},   count = min(ceil((last + 1) / multiple_of) multiple_of, stages)

    Args:
        stages: Q, the number of stages.
        cutoff_index: the lowest index that the last active stage may have.
        multiple_of: the count is rounded up to a multiple of this.
        seed: determines the draw; by default `draw_seed` provides one.

    Source: Zeghidour et al., SoundStream, 2021, section III-C; Défossez et al., EnCodec, 2022, for the multiple.
    """
    return draw_stage_counts(1, stages, cutoff_index=cutoff_index, multiple_of=multiple_of, seed=seed)[0]


def draw_stage_counts(
    items: int, stages: int, *, cutoff_index: int = 0, multiple_of: int = 1, seed: int | None = None
) -> list[int]:
    """Draw the number of leading stages for each of several items independently, as `draw_stage_count` does for one."""
    generator = random.Random(draw_seed() if seed is None else seed)
    return [
        min(math.ceil((generator.randrange(cutoff_index, stages) + 1) / multiple_of) * multiple_of, stages)
        for _ in range(items)
    ]


class ActiveStages(NamedTuple):
    """The leading stages that take part in one call.

    In eager mode `number` is an int, and a stage that `skips` need not be computed. A compiled graph can't branch on a
    random number: there `number` is a tensor (), every stage is computed, and `fill` overwrites the inactive ones. A
    tensor (B,) has a number for each item, one (R,) for each row. The stages before `start` are left out.
    """

    number: int | Tensor
    start: int = 0

    @staticmethod
    def of_call(
        n_quantizers: int | Tensor | None, start: int, *, items: int, stages: int, least: int = 1
    ) -> ActiveStages:
        """Return the stages of the arguments `n_quantizers` and `start` of a call: those from `start` on before it.

        Args:
            n_quantizers: for all items, or int (B,) with one for each; None for all stages.
            start: the first of them.
            items, stages: B, and the number of all stages.
            least: the least number of active stages of an item. The values of a tensor are not checked in a compiled
                graph.

        Raises:
            ValueError: a number is out of range, or there is not one for each item. TypeError: they are no integers.
        """
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < stages:
            raise ValueError(f"start: must be an integer in [0, {stages}), got {start!r}")
        if n_quantizers is None:
            return ActiveStages(stages, start)
        beside = f" beside start={start}" if start else ""
        if not isinstance(n_quantizers, Tensor):
            if isinstance(n_quantizers, bool) or not isinstance(n_quantizers, int):
                raise TypeError(f"n_quantizers: must be an int or a tensor of ints, got {n_quantizers!r}")
            if not start < n_quantizers <= stages:
                raise ValueError(f"n_quantizers: must lie in [{start + 1}, {stages}]{beside}, got {n_quantizers}")
            return ActiveStages(n_quantizers, start)
        if n_quantizers.is_floating_point() or n_quantizers.dtype == torch.bool:
            raise TypeError(f"n_quantizers: must be an int or a tensor of ints, got {n_quantizers.dtype}")
        if n_quantizers.shape != (items,):
            raise ValueError(f"n_quantizers: must have shape (B,) = ({items},), got {tuple(n_quantizers.shape)}")
        if torch.compiler.is_compiling() or not items:
            return ActiveStages(n_quantizers, start)
        least += start
        if not least <= int(n_quantizers.min()) <= int(n_quantizers.max()) <= stages:
            raise ValueError(f"n_quantizers: must lie in [{least}, {stages}]{beside}, got {n_quantizers.tolist()}")
        return ActiveStages(n_quantizers, start)

    def of_rows(self, rows: int) -> ActiveStages:
        """Return the stages of each row of items with as many rows each."""
        if isinstance(self.number, int):
            return self
        return self._replace(number=self.number.repeat_interleave(rows))

    def shaped(self, shape: tuple[int, ...]) -> ActiveStages:
        """Return the stages with numbers of items or rows as a tensor of a shape."""
        if isinstance(self.number, int) or self.number.dim() == 0:
            return self
        return self._replace(number=self.number.view(shape))

    def of_any_row(self) -> ActiveStages:
        """Return the stages that take part in some row."""
        if isinstance(self.number, int) or self.number.dim() == 0:
            return self
        return self._replace(number=self.number.amax() if self.number.numel() else self.number.new_zeros(()))

    def skips(self, stage: int) -> bool:
        """Return whether the stage is inactive and this is known before it runs."""
        return stage < self.start or (isinstance(self.number, int) and stage >= self.number)

    def fill(self, stage: int, value: Tensor, fill: float) -> Tensor:
        """Return `value` if the stage is active, else a tensor of `fill`: -1 for indices, 0 for losses and codes."""
        if self.skips(stage):
            return torch.full_like(value, fill)
        return value if isinstance(self.number, int) else torch.where(self.number > stage, value, fill)

    def fill_indices(self, indices: Tensor) -> Tensor:
        """Return indices (..., Q) of the stages from `start` on, with -1 where a stage is inactive."""
        stages = enumerate(indices.unbind(-1), self.start)
        return torch.stack([self.fill(stage, own, -1) for stage, own in stages], -1)

    def row_mask(self, stage: int, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """Return the mask (...) of a stage's rows x (..., D): `mask` for an active stage, else all False."""
        if isinstance(self.number, int):
            return mask
        active = (self.number > stage).expand(x.shape[:-1])
        return active if mask is None else active & mask


class QuantizeDropout(NamedTuple):
    """Settings of quantize dropout; see `draw_stage_count`."""

    stages: int
    enabled: bool = False
    cutoff_index: int = 0
    multiple_of: int = 1
    per_item: bool = False

    def check(self) -> QuantizeDropout:
        """Validate the settings and return self.

        Raises:
            ValueError: cutoff_index or multiple_of is out of range.
        """
        if not (isinstance(self.cutoff_index, Integral) and 0 <= self.cutoff_index < self.stages):
            raise ValueError(
                f"quantize_dropout_cutoff_index: must be an integer in [0, {self.stages}), got {self.cutoff_index}"
            )
        check_sizes(quantize_dropout_multiple_of=self.multiple_of)
        return self

    def draw(
        self, training: bool, x: Tensor, seed: int | Tensor | None = None, *, items: int = 1, rows: int = 1
    ) -> ActiveStages:
        """Draw the active stages of a call on x's device.

        All stages are active in eval mode, without dropout, and if there is only one.

        Args:
            training: whether the layer is in training mode.
            x: a tensor of the call.
            seed: see `draw_stage_count`.
            items, rows: the number of items and of rows of each, where a number is drawn for each item.
        """
        if not (training and self.enabled and self.stages > 1):
            return ActiveStages(self.stages)
        if self.per_item:
            given = torch.tensor(seed) if isinstance(seed, int) else seed
            counts = _draw_stage_counts(x, items, self.stages, self.cutoff_index, self.multiple_of, given)
            return ActiveStages(counts).of_rows(rows)
        if torch.compiler.is_compiling():
            seed = torch.tensor(seed) if isinstance(seed, int) else seed
            return ActiveStages(_draw_stage_count(x, self.stages, self.cutoff_index, self.multiple_of, seed))
        seed = None if seed is None else int(seed)
        return ActiveStages(
            draw_stage_count(self.stages, cutoff_index=self.cutoff_index, multiple_of=self.multiple_of, seed=seed)
        )


class NestedDropout(NamedTuple):
    """Settings of nested dropout: with `probability`, only the first stages of a hierarchy are put out.

        count ~ U{least, ..., stages - 1} with `probability`, else stages

    Source: Rippel et al., Learning Ordered Representations with Nested Dropout, 2014.
    """

    stages: int
    probability: float = 0.0
    least: int = 1

    def check(self) -> NestedDropout:
        """Validate the settings and return self.

        Raises:
            ValueError: probability or least is out of range.
        """
        if not 0 <= self.probability <= 1:
            raise ValueError(f"nested_dropout: must lie in [0, 1], got {self.probability}")
        if self.least < 1:
            raise ValueError(f"nested_dropout_min_levels: must be at least 1, got {self.least}")
        return self

    def draw(self, training: bool, x: Tensor) -> ActiveStages:
        """Draw the active stages of a call on x's device. All stages are active in eval mode."""
        if not training or self.probability == 0 or self.least >= self.stages:
            return ActiveStages(self.stages)
        if torch.compiler.is_compiling():
            return ActiveStages(_draw_nested_count_op(x, self.stages, as_scalar(self.probability), self.least))
        return ActiveStages(_draw_nested_count(self.stages, self.probability, self.least))


def _draw_nested_count(stages: int, probability: float, least: int) -> int:
    generator = random.Random(draw_seed())
    if generator.random() >= probability:
        return stages
    return generator.randrange(least - 1, stages - 1) + 1


# The draws below are ops because neither Python's generator nor a number on the host can be traced: a compiled graph
# calls them at run time and draws as eager mode does.


@torch.library.custom_op("fastvq::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_seed(x: Tensor) -> Tensor:
    """Return `draw_seed()` as a tensor () on the CPU."""
    return torch.tensor(draw_seed())


@_draw_seed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("fastvq::draw_stage_count", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_stage_count(x: Tensor, stages: int, cutoff_index: int, multiple_of: int, seed: Tensor | None) -> Tensor:
    """Return `draw_stage_count` as a tensor () on x's device; the seed is on the CPU."""
    given = None if seed is None else int(seed)
    count = draw_stage_count(stages, cutoff_index=cutoff_index, multiple_of=multiple_of, seed=given)
    return torch.tensor(count, device=x.device)


@_draw_stage_count.register_fake
def _(x: Tensor, stages: int, cutoff_index: int, multiple_of: int, seed: Tensor | None) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("fastvq::draw_stage_counts", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_stage_counts(
    x: Tensor, items: int, stages: int, cutoff_index: int, multiple_of: int, seed: Tensor | None
) -> Tensor:
    """Return `draw_stage_counts` as a tensor (items,) on x's device; the seed is on the CPU."""
    given = None if seed is None else int(seed)
    counts = draw_stage_counts(items, stages, cutoff_index=cutoff_index, multiple_of=multiple_of, seed=given)
    return torch.tensor(counts, dtype=torch.int64, device=x.device)


@_draw_stage_counts.register_fake
def _(x: Tensor, items: int, stages: int, cutoff_index: int, multiple_of: int, seed: Tensor | None) -> Tensor:
    return x.new_empty((items,), dtype=torch.int64)


@torch.library.custom_op("fastvq::draw_nested_count", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_nested_count_op(x: Tensor, stages: int, probability: Tensor, least: int) -> Tensor:
    """Return `_draw_nested_count` as a tensor () on x's device; the probability () is on the CPU."""
    return torch.tensor(_draw_nested_count(stages, float(probability), least), device=x.device)


@_draw_nested_count_op.register_fake
def _(x: Tensor, stages: int, probability: Tensor, least: int) -> Tensor:
    return x.new_empty((), dtype=torch.int64)
