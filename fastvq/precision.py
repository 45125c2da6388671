"""State that keeps its precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class KeepsPrecision:
    """For a module (before nn.Module among its bases) whose state follows it to another device, never to another dtype:
    rounding a moving average or a codebook to half precision would end its learning."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[misc]
