"""What a recomputed forward pass needs from the one it repeats.

Activation checkpointing (torch.utils.checkpoint, both kinds) runs a layer's forward again within the backward pass. By
then the codebook has learned from the batch; searched again, it would give other codes and other gradients, and it
would learn twice. So a layer that learns remembers the codes that it searched, and a forward within a backward pass
takes these and changes nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from .distributed import checksum, recomputing

__all__ = ["History", "recomputing"]

REMEMBERED = 2
"""Forward passes whose codes are kept: those of a layer that is used twice before the backward pass."""


class History:
    """The codes that the last forward passes searched, by the vectors that they were given."""

    def __init__(self) -> None:
        self._passes: deque[tuple[Tensor, Tensor]] = deque(maxlen=REMEMBERED)

    def remember(self, x: Tensor, codes: Tensor) -> None:
        """Keeps `codes` for the recomputation with the vectors x (..., D): a tensor that nobody will write to."""
        if not torch.compiler.is_compiling():
            self._passes.append((_mark(x), codes.detach()))

    def recall(self, x: Tensor) -> Tensor:
        """The codes that were kept for x, which are then forgotten.

        Raises:
            RuntimeError: x isn't among the last passes.
        """
        # A single one needn't be looked for: a GPU may compute x slightly otherwise the second time.
        found = 0 if len(self._passes) == 1 else None
        mark = None if found == 0 else _mark(x)
        for place in reversed(range(len(self._passes))):
            if found is None and mark is not None and torch.equal(self._passes[place][0], mark):
                found = place
        if found is None:
            raise RuntimeError(
                "a recomputation within backward doesn't repeat one of the layer's last"
                f" {REMEMBERED} forward passes: run backward sooner after forward, or freeze the codebook"
            )
        codes = self._passes[found][1]
        del self._passes[found]
        return codes

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, _: dict[int, Any]) -> History:
        return History()


def _mark(x: Tensor) -> Tensor:
    """What tells one batch from another: a sum over the bits of its first rows."""
    return checksum(x.detach().reshape(-1, x.shape[-1])[:64])
