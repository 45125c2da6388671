"""What a recomputed forward pass needs from the one it repeats.

Activation checkpointing (torch.utils.checkpoint, both kinds) runs a layer's forward again within the backward pass. By
then the codebook has learned from the batch; searched again, it would give other codes and other gradients, and it
would learn twice. So a layer that learns remembers the codes that it searched, and a forward within a backward pass
takes these and changes nothing. It remembers them only where checkpointing may be at work: a copy of the codebook is
much of a small step.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvq.distributed import recomputing

if TYPE_CHECKING:
    from . import Codebook

__all__ = ["History", "Repeatable", "recomputing"]

REMEMBERED = 2
"""Forward passes whose codes are kept: those of a layer that is used twice before the backward pass."""


MARK_ROWS = 16


class History:
    """The codes that the last forward passes searched, by the vectors that they were given."""

    def __init__(self, passes: int = REMEMBERED) -> None:
        self._passes: deque[tuple[Tensor, list[Tensor | None]]] = deque(maxlen=passes)

    def remember(self, x: Tensor, codes: list[Tensor | None]) -> None:
        """Keeps `codes` for the recomputation with the vectors x (..., D): tensors that nobody will write to."""
        self._passes.append((_mark(x), codes))

    def recall(self, x: Tensor) -> list[Tensor | None]:
        """The codes that were kept for x, which are then forgotten.

        Raises:
            RuntimeError: x isn't among the last passes.
        """
        place = self._find(x)
        codes = self._passes[place][1]
        del self._passes[place]
        return codes

    def _find(self, x: Tensor) -> int:
        if len(self._passes) == 1:  # needn't match: a GPU may compute x slightly otherwise the second time
            return 0
        mark = _mark(x)
        for place in reversed(range(len(self._passes))):
            if torch.equal(self._passes[place][0], mark):
                return place
        raise RuntimeError(
            "a recomputation within backward doesn't repeat one of the layer's last"
            f" {self._passes.maxlen} forward passes: run backward sooner after forward, or freeze the codebook"
        )

    # What is kept belongs to a backward pass of this process, and to no copy of the layer.
    def __getstate__(self) -> dict[str, Any]:
        return {"passes": self._passes.maxlen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, _: dict[int, Any]) -> History:
        return History(**self.__getstate__())


# torch's own way to see the hooks, which it doesn't promise to keep: without it every pass is remembered.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _may_be_repeated() -> bool:
    """Whether this forward may be the first pass of activation checkpointing, which runs it without gradients
    (reentrant) or with hooks on what autograd saves (not reentrant)."""
    if not torch.is_grad_enabled() or _top_hooks is None:
        return True
    return _top_hooks(False) is not None


def _mark(x: Tensor) -> Tensor:
    """What tells one batch from another: a copy of its first rows, NaN as 0."""
    return x.detach().reshape(-1, x.shape[-1])[:MARK_ROWS].nan_to_num()


class Repeatable:
    """For a layer whose codebooks learn in its forward: `_begin_pass` before the codes are used, `_note_pass` when they
    have been and before they learn, `_end_pass` at the end, each with the vectors x (..., D).

    The layer says in `_learning_codebooks` which these are, and has a `_history`.
    """

    _history: History

    @property
    def _learning_codebooks(self) -> list[Codebook]:
        raise NotImplementedError

    def _begin_pass(self, x: Tensor) -> None:
        if recomputing():
            for codebook, codes in zip(self._learning_codebooks, self._history.recall(x), strict=True):
                codebook.replayed = codes

    def _note_pass(self, x: Tensor) -> None:
        # Dynamo traces checkpointing as a whole, and doesn't let it change state.
        if not torch.compiler.is_compiling() and _may_be_repeated() and not recomputing():
            codebooks = self._learning_codebooks
            self._history.remember(x, [c.codes.detach().clone() if c.learns() else None for c in codebooks])

    def _end_pass(self) -> None:
        if recomputing():
            for codebook in self._learning_codebooks:
                codebook.replayed = None
