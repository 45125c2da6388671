"""Chain of modules that contains one quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored

from .residual import SharedSetting

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

    freeze_codebook = SharedSetting("_quantizers")
    decay = SharedSetting("_quantizers")
    commitment_weight = SharedSetting("_quantizers")
    sample_codebook_temp = SharedSetting("_quantizers")

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        quantizers = [type(fn).__name__ for fn in fns if isinstance(fn, QUANTIZE_KLASSES)]
        if len(quantizers) != 1:
            raise ValueError(f"fns: must contain exactly one quantizer, got {', '.join(quantizers) or 'none'}")
        self.fns = nn.ModuleList(fns)

    @property
    def quantizer(self) -> Any:
        """The quantizer among the modules."""
        return self.fns[self._place]

    @property
    def _quantizers(self) -> list[Any]:
        return [self.quantizer]

    @property
    def _place(self) -> int:
        return next(place for place, fn in enumerate(self.fns) if isinstance(fn, QUANTIZE_KLASSES))

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

    def resize_(self, codebook_size: int) -> None:
        """Call `resize_` of the quantizer, if it has a codebook."""
        self.quantizer.resize_(codebook_size)

    @torch.no_grad()
    def fit(
        self, batches: Iterable[Any], *, inputs: Callable[[Any], Tensor] | None = None, iterations: int = 10
    ) -> Any:
        """Call `fit` of the quantizer, if it has a codebook, with what the modules before it make of the batches."""

        def before(batch: Any) -> Tensor:
            return self._before(batch if inputs is None else inputs(batch))

        return self.quantizer.fit(batches, inputs=before, iterations=iterations)

    @torch.no_grad()
    def encode(self, x: Tensor, **options: Any) -> Any:
        """Return what `encode` of the quantizer does, of the modules' results before it. `options` are its own.

        The modules run as they are: in training, a batch norm before the quantizer updates its averages.
        """
        return self.quantizer.encode(self._before(x), **options)

    def get_output_from_indices(self, indices: Any, **options: Any) -> Any:
        """Return the last module's result for indices of the quantizer. `options` are the quantizer's."""
        return self._after(self.quantizer.get_output_from_indices(indices, **options))

    def _before(self, x: Any) -> Any:
        for fn in self.fns[: self._place]:
            x = fn(x)
        return x

    def _after(self, x: Any) -> Any:
        for fn in self.fns[self._place + 1 :]:
            x = fn(x)
        return x

    def reinitialize_(self) -> None:
        """Call `reinitialize_` of the quantizer, if it has a codebook."""
        self.quantizer.reinitialize_()

    def forward(self, x: Tensor, **options: Any) -> tuple[Any, ...]:
        """Return (the last module's result, the quantizer's other results ...) of x. `options` are the quantizer's."""
        result = self.quantizer(self._before(x), **options)
        first, *others = result if isinstance(result, tuple) else (result,)
        return (self._after(first), *others)

    if TYPE_CHECKING:
        __call__ = forward
