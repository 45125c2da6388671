"""The stack of stages that all residual quantizers share; dropout may leave out the last stages."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvq.codebook.health import Monitored
from fastvq.parts.dropout import QuantizeDropout
from fastvq.parts.indices import checked_indices


class ResidualStack(Monitored, nn.Module):
    """Base of quantizers whose stages each quantize the residual of the stages before.

    State: `layers`, the stages, which a subclass sets; its `_stages` returns them with their type.
    """

    layers: nn.ModuleList

    def _set_dropout(self, stages: int, enabled: bool, cutoff_index: int, multiple_of: int) -> None:
        """Set the number of stages, and the settings of `fastvq.parts.dropout`.

        Raises:
            ValueError: a setting is out of range; the message names it.
        """
        if stages < 1:
            raise ValueError(f"num_quantizers: must be at least 1, got {stages}")
        self.num_quantizers = stages
        self.quantize_dropout = enabled and stages > 1
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
    def _stages(self) -> list[Any]:
        return list(self.layers)

    @property
    def _monitored(self) -> list[Monitored]:
        return list(self._stages)

    def _checked_stages(self, indices: Tensor) -> Tensor:
        """Return indices (..., 1 to Q) for decoding, as `checked_indices` of `fastvq.parts.indices` returns them."""
        if not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"indices: must have shape (..., 1 to {self.num_quantizers} stages), got {tuple(indices.shape)}"
            )
        return checked_indices(indices, [stage.codebook_size for stage in self._stages])
