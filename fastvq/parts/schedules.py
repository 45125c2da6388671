"""Schedules of numbers that a module has as buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .arguments import check_fractions


class Annealed:
    """Mixin, before nn.Module, of modules with numbers that move from a first to a last value in training.

        value = first + (last - first) min(1, progress / annealing)

    The numbers are float32 buffers (), so that writing to one compiles nothing anew. A training loop calls `anneal_` of
    each such module before each step; without that call they keep their first values.
    """

    annealing: float
    _schedules: dict[str, tuple[float, float]]

    def _set_schedules(self, annealing: float, schedules: Mapping[str, tuple[float, float | None]]) -> None:
        """Register the buffers, in __init__.

        Args:
            annealing: share of the training in which the numbers move, in [0, 1]; 0 means that they have their last
                values from the beginning.
            schedules: {name: (first value, last value)}; None for a number that stays.
        """
        check_fractions(annealing=annealing)
        self.annealing = annealing
        self._schedules = {}
        for name, (first, last) in schedules.items():
            self._schedules[name] = (first, first if last is None else last)
            self.register_buffer(name, torch.tensor(float(first)))  # type: ignore[attr-defined]

    @torch.no_grad()
    def anneal_(self, progress: float) -> None:
        """Set the numbers to those at `progress`, the share of the training that is done, in [0, 1]."""
        check_fractions(progress=progress)
        share = min(1.0, progress / self.annealing) if self.annealing else 1.0
        for name, (first, last) in self._schedules.items():
            buffer: Tensor = getattr(self, name)
            buffer.fill_(first + (last - first) * share)
