"""Forward passes that activation checkpointing repeats.

Activation checkpointing (torch.utils.checkpoint, reentrant or not) runs a layer's forward again within the backward
pass. By then the codebook has learned from the batch: another search would return other indices and gradients, and the
codebook would learn twice. A layer that learns therefore keeps the codes of its last forward passes, and a forward
within a backward pass uses these codes and changes no state. Codes are only kept where checkpointing may be active,
because a copy of the codebook is a large part of the cost of a small step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvq.distributed import recomputing

REMEMBERED = 2
"""Number of forward passes whose codes are kept: enough for a layer that is used twice before the backward pass."""

MARK_ROWS = 16
"""Number of rows that identify a batch."""


class ReplayableCodebook(Protocol):
    """The part of a codebook that `History` uses."""

    replayed: Tensor | None

    @property
    def codes(self) -> Tensor: ...

    def learns(self) -> bool: ...


class History:
    """The codes that the last forward passes of a layer searched, identified by the vectors of the pass.

    If `fastvq.distributed.may_be_recomputed`, a layer that learns calls `replay` before it uses its codes, `record`
    after that and before it learns, and `finish` at the end of the pass, each with the codebooks that may learn.
    """

    def __init__(self, passes: int = REMEMBERED) -> None:
        self._passes: deque[tuple[Tensor, list[Tensor | None]]] = deque(maxlen=passes)

    def replay(self, x: Tensor, codebooks: Sequence[ReplayableCodebook]) -> None:
        """Make a repeated pass with the vectors x (..., D) use the codes of the pass that it repeats."""
        if recomputing():
            for codebook, codes in zip(codebooks, self.recall(x), strict=True):
                codebook.replayed = codes

    def record(self, x: Tensor, codebooks: Sequence[ReplayableCodebook]) -> None:
        """Keep a copy of the codes for a repetition of the pass with the vectors x (..., D)."""
        if not recomputing():
            self.remember(x, [c.codes.detach().clone() if c.learns() else None for c in codebooks])

    def finish(self, codebooks: Sequence[ReplayableCodebook]) -> None:
        """End a repeated pass: the codebooks use their own codes again."""
        if recomputing():
            for codebook in codebooks:
                codebook.replayed = None

    def clear(self) -> None:
        """Forget all passes."""
        self._passes.clear()

    def remember(self, x: Tensor, codes: list[Tensor | None]) -> None:
        """Keep `codes`, which nobody may write to, for the repetition with the vectors x (..., D)."""
        self._passes.append((_mark(x), codes))

    def recall(self, x: Tensor) -> list[Tensor | None]:
        """Return the codes that were kept for x, and forget them.

        Raises:
            RuntimeError: x does not belong to one of the last passes.
        """
        place = self._find(x)
        codes = self._passes[place][1]
        del self._passes[place]
        return codes

    def _find(self, x: Tensor) -> int:
        if len(self._passes) == 1:  # no comparison: on a GPU, the repetition of x may differ slightly
            return 0
        mark = _mark(x)
        for place in reversed(range(len(self._passes))):
            if torch.equal(self._passes[place][0], mark):
                return place
        raise RuntimeError(
            "a recomputation within backward doesn't repeat one of the layer's last"
            f" {self._passes.maxlen} forward passes: run backward sooner after forward, or freeze the codebook"
        )

    # The kept codes belong to a backward pass of this process, not to copies of the layer.
    def __getstate__(self) -> dict[str, Any]:
        return {"passes": self._passes.maxlen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, _: dict[int, Any]) -> History:
        return History(**self.__getstate__())


def _mark(x: Tensor) -> Tensor:
    """Return a copy of the first rows of x, with 0 for NaN, to compare batches by."""
    return x.detach().reshape(-1, x.shape[-1])[:MARK_ROWS].nan_to_num()
