"""Chain of modules that contains one quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored

QUANTIZE_KLASSES = (Monitored,)
"""Classes that `Sequential` recognizes as quantizers: all of fastvq."""


class Sequential(Monitored, nn.Module):
    """Chain of modules, exactly one of them a quantizer, with the API of vector_quantize_pytorch.

    Modules after the quantizer are applied to the first of its results; the others are passed through.

    Args:
        fns: the modules.

    Raises:
        ValueError: there is no quantizer among the modules, or more than one.
    """

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        quantizers = [type(fn).__name__ for fn in fns if isinstance(fn, QUANTIZE_KLASSES)]
        if len(quantizers) != 1:
            raise ValueError(f"fns: must contain exactly one quantizer, got {', '.join(quantizers) or 'none'}")
        self.fns = nn.ModuleList(fns)

    @property
    def quantizer(self) -> Any:
        """The quantizer among the modules."""
        return next(fn for fn in self.fns if isinstance(fn, QUANTIZE_KLASSES))

    @property
    def _health(self) -> Health:  # type: ignore[override]
        return self.quantizer._health

    @property
    def _monitored(self) -> list[Monitored] | None:
        return self.quantizer._monitored

    def _parts(self) -> Iterator[Monitored]:
        return self.quantizer._parts()

    @property
    def _synchronizes(self) -> bool:
        return self.quantizer._synchronizes

    @property
    def freeze_codebook(self) -> bool:
        """The quantizer's own attribute; assignment sets it there."""
        return self.quantizer.freeze_codebook

    @freeze_codebook.setter
    def freeze_codebook(self, frozen: bool) -> None:
        self.quantizer.freeze_codebook = frozen

    def reinitialize_(self) -> None:
        """Call `reinitialize_` of the quantizer, if it has a codebook."""
        self.quantizer.reinitialize_()

    def forward(self, x: Tensor, **options: Any) -> tuple[Any, ...]:
        """Return (the last module's result, the quantizer's other results ...) of x. `options` are the quantizer's."""
        others: list[Any] = []
        for fn in self.fns:
            if isinstance(fn, QUANTIZE_KLASSES):
                result = fn(x, **options)
                x, *others = result if isinstance(result, tuple) else (result,)
            else:
                x = fn(x)
        return (x, *others)

    if TYPE_CHECKING:
        __call__ = forward
