"""A chain of modules with one quantizer in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvq.codebook.health import HealthReport, Monitored

QUANTIZE_KLASSES = (Monitored,)
"""What counts as a quantizer: every one of fastvq."""


class Sequential(Monitored, nn.Module):
    """Modules in a row, exactly one of them a quantizer, with the API of vector_quantize_pytorch.

    What comes before the quantizer and after it, such as convolutions, is applied to the first of its results; the
    others are passed by.

    Args:
        fns: the modules.

    Raises:
        ValueError: there is no quantizer among them, or several.
    """

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        quantizers = [type(fn).__name__ for fn in fns if isinstance(fn, QUANTIZE_KLASSES)]
        if len(quantizers) != 1:
            raise ValueError(f"fns: must contain exactly one quantizer, got {', '.join(quantizers) or 'none'}")
        self.fns = nn.ModuleList(fns)

    @property
    def quantizer(self) -> Any:
        """The one among them."""
        return next(fn for fn in self.fns if isinstance(fn, QUANTIZE_KLASSES))

    @property
    def code_counts(self) -> Tensor:
        """Those of the quantizer."""
        return self.quantizer.code_counts

    def health(self) -> HealthReport:
        """That of the quantizer."""
        return self.quantizer.health()

    def reset_health(self) -> None:
        """Starts it afresh."""
        self.quantizer.reset_health()

    def forward(self, x: Tensor, **options: Any) -> tuple[Any, ...]:
        """(the last module's result, the quantizer's other results ...) of x. `options` are the quantizer's."""
        others: list[Any] = []
        for fn in self.fns:
            if isinstance(fn, QUANTIZE_KLASSES):
                result = fn(x, **options)
                x, *others = result if isinstance(result, tuple) else (result,)
            else:
                x = fn(x)
        return (x, *others)
