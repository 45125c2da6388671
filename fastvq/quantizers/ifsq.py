"""iFSQ: finite scalar quantization whose levels are used evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvq.parts.arguments import in_the_name_of
from fastvq.parts.scalar import Bound

from .fsq import FSQ


class IFSQ(FSQ):
    """Finite scalar quantizer with the bound of iFSQ.

        quantized = project_out(code),   code_i = round(h_i f(project_in(z)_i)) / h_i
        f(z) = 2 sigmoid(1.6 z) - 1,   h_i = (L_i - 1) / 2

    The bound maps a standard normal variable to a nearly uniform one, so that its levels are used about equally often,
    where tanh, the bound of `FSQ`, favors the outer levels. Nothing else differs from `FSQ(preserve_symmetry=True)`.

    Args:
        levels: L_i of each dimension, odd. The paper recommends about 4 bits a dimension.
        settings: other arguments of `FSQ`, without preserve_symmetry and bound_hard_clamp.

    Raises:
        ValueError: an invalid argument, by name. TypeError: an unknown argument.

    Numerics: as for `FSQ`.

    Source: Lin et al., iFSQ: Improving FSQ for Image Generation with 1 Line of Code, 2026 (arXiv 2601.17124). The text
    of the paper was not at hand: the formula is that of its abstract's summaries and of code that cites it.
    """

    def __init__(self, levels: Sequence[int], dim: int | None = None, **settings: Any) -> None:
        for name in ("preserve_symmetry", "bound_hard_clamp"):
            if name in settings:
                raise TypeError(f"{name}: is not an argument of IFSQ, whose bound is fixed")
        with in_the_name_of(self):
            super().__init__(levels, dim, preserve_symmetry=True, **settings)
        if any(size % 2 == 0 for size in self._bound.levels):
            raise ValueError(f"levels: must be odd, so that one is zero, got {list(levels)}")
        self._bound = Bound(self._bound.levels, symmetric=True, squash="sigmoid")
