"""What residual quantizers of every kind have in common: a stack of levels, of which dropout may leave out the last."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from fastvq.codebook.health import Monitored
from fastvq.parts.dropout import QuantizeDropout
from fastvq.parts.indices import checked_indices

Level = TypeVar("Level", bound=Monitored)


class Levels(Monitored, nn.Module, Generic[Level]):
    """Quantizers, each for what the ones before it left over. State: `layers`, which a subclass sets."""

    layers: nn.ModuleList

    def _set_dropout(self, levels: int, enabled: bool, cutoff_index: int, multiple_of: int) -> None:
        """The number of levels, and the settings of `fastvq.parts.dropout`.

        Raises:
            ValueError: they can't be, by name.
        """
        if levels < 1:
            raise ValueError(f"num_quantizers: must be at least 1, got {levels}")
        self.num_quantizers = levels
        self.quantize_dropout = enabled and levels > 1
        self.quantize_dropout_cutoff_index = cutoff_index
        self.quantize_dropout_multiple_of = multiple_of
        self._dropout.check()

    @property
    def _dropout(self) -> QuantizeDropout:
        return QuantizeDropout(
            self.num_quantizers,
            self.quantize_dropout,
            self.quantize_dropout_cutoff_index,
            self.quantize_dropout_multiple_of,
        )

    @property
    def _levels(self) -> list[Level]:
        return [cast(Level, layer) for layer in self.layers]

    @property
    def _monitored(self) -> list[Monitored]:
        return list(self._levels)

    def _checked_levels(self, indices: Tensor) -> Tensor:
        """Indices (..., 1 to Q) to decode, as `fastvq.parts.indices` gives them."""
        if not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"indices: must have shape (..., 1 to {self.num_quantizers} levels), got {tuple(indices.shape)}"
            )
        return checked_indices(indices, [cast(Any, level).codebook_size for level in self._levels])
