"""Residual quantizer of Mimi: semantic stages beside acoustic ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvq.codebook.fit import Fitted
from fastvq.codebook.health import Monitored
from fastvq.parts.arguments import in_the_name_of

from .residual_vq import ResidualVQ


class SplitResidualVQ(Monitored, nn.Module):
    """Two residual quantizers of the same vectors, whose outputs are added: that of Mimi.

        quantized = semantic(x) + acoustic(x)

    The semantic stages do not quantize what the acoustic ones leave, nor the other way round. They can be taught by
    another model without a detour through the sound: `semantic` may be called alone.

    Args:
        dim: dimension of the vectors.
        codebook_size: K of each stage.
        num_quantizers: number of stages of both, at least 2.
        num_semantic: number of the semantic ones among them.
        codebook_dim: D, dimension of the codes; each of the two projects to it if it is not dim.
        settings: other arguments of both `ResidualVQ`, such as channel_last, stage_axis and gradient. Quantize dropout
            leaves out acoustic stages alone.

    State: semantic, acoustic.

    Raises:
        ValueError, TypeError: an invalid argument, by name.

    Source: Defossez et al., Moshi: a speech-text foundation model for real-time dialogue, 2024, section 3.3.3.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        num_quantizers: int = 8,
        num_semantic: int = 1,
        codebook_dim: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not 1 <= num_semantic < num_quantizers:
            raise ValueError(
                f"num_semantic: must lie in [1, {num_quantizers}), as num_quantizers counts both, got {num_semantic}"
            )
        sizes = {"dim": dim, "codebook_size": codebook_size, "codebook_dim": codebook_dim}
        kept = {name: value for name, value in settings.items() if not name.startswith("quantize_dropout")}
        with in_the_name_of(self):
            self.semantic = ResidualVQ(num_quantizers=num_semantic, **sizes, **kept)  # type: ignore[arg-type]
            acoustic = num_quantizers - num_semantic
            self.acoustic = ResidualVQ(num_quantizers=acoustic, **sizes, **settings)  # type: ignore[arg-type]
        self.dim, self.codebook_size = dim, codebook_size
        self.num_quantizers, self.num_semantic = num_quantizers, num_semantic

    @property
    def _monitored(self) -> list[Monitored]:
        return [*self.semantic._monitored, *self.acoustic._monitored]

    def _parts(self) -> Iterator[Monitored]:
        yield self
        yield from self.semantic._parts()
        yield from self.acoustic._parts()

    @property
    def freeze_codebook(self) -> bool:
        """True if the codebooks of all stages are frozen; assigning sets it for each of them."""
        return self.semantic.freeze_codebook and self.acoustic.freeze_codebook

    @freeze_codebook.setter
    def freeze_codebook(self, frozen: bool) -> None:
        self.semantic.freeze_codebook = self.acoustic.freeze_codebook = frozen

    @property
    def decay(self) -> float | Tensor:
        """The decay of the moving averages of the first stage; assigning sets it for all stages."""
        return self.semantic.decay

    @decay.setter
    def decay(self, decay: float | Tensor) -> None:
        self.semantic.decay = self.acoustic.decay = decay

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """The codes (K, D) of each stage."""
        return (*self.semantic.codebooks, *self.acoustic.codebooks)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        n_quantizers: int | None = None,
        freeze_codebook: bool | None = None,
        accum_ema_update: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, losses) of x.

        Args:
            x, mask, lens: as for `ResidualVQ`.
            n_quantizers: number of stages that take part, the semantic ones first; more than num_semantic.
            freeze_codebook, accum_ema_update: as for `ResidualVQ`, of both.

        Returns:
            quantized, shaped and typed as x; indices and losses of all stages, the semantic ones first.

        Raises:
            ValueError, TypeError: an invalid argument, by name.
        """
        number = self._acoustic_number(n_quantizers)
        options: dict[str, Any] = {"freeze_codebook": freeze_codebook, "accum_ema_update": accum_ema_update}
        first = self.semantic(x, mask, lens=lens, **options)
        second = self.acoustic(x, mask, lens=lens, n_quantizers=number, **options)
        indices = torch.cat([first[1], second[1]], self.semantic.stage_axis)
        return first[0] + second[0], indices, torch.cat([first[2], second[2]])

    if TYPE_CHECKING:
        __call__ = forward

    def encode(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        n_quantizers: int | None = None,
    ) -> Tensor:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        number = self._acoustic_number(n_quantizers)
        first = self.semantic.encode(x, mask, lens=lens)
        second = self.acoustic.encode(x, mask, lens=lens, n_quantizers=number)
        return torch.cat([first, second], self.semantic.stage_axis)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return the quantized output of `forward` for these indices, or for those of the first stages alone."""
        axis = self.semantic.stage_axis
        given = indices.shape[axis]
        if not 1 <= given <= self.num_quantizers:
            raise ValueError(f"indices: must have 1 to {self.num_quantizers} stages, got {given}")
        first = indices.narrow(axis, 0, min(given, self.num_semantic))
        total = self.semantic.get_output_from_indices(first)
        if given > self.num_semantic:
            rest = indices.narrow(axis, self.num_semantic, given - self.num_semantic)
            total = total + self.acoustic.get_output_from_indices(rest)
        return total

    def reinitialize_(self) -> None:
        """Call `ResidualVQ.reinitialize_` of both."""
        self.semantic.reinitialize_()
        self.acoustic.reinitialize_()

    def fit(
        self, batches: Iterable[Any], *, inputs: Callable[[Any], Tensor] | None = None, iterations: int = 10
    ) -> list[Fitted]:
        """Call `ResidualVQ.fit` of both; the result has one for each stage."""
        return [
            *self.semantic.fit(batches, inputs=inputs, iterations=iterations),
            *self.acoustic.fit(batches, inputs=inputs, iterations=iterations),
        ]

    def commit_ema_update(self) -> None:
        """Call `ResidualVQ.commit_ema_update` of both."""
        self.semantic.commit_ema_update()
        self.acoustic.commit_ema_update()

    def _acoustic_number(self, n_quantizers: int | None) -> int | None:
        if n_quantizers is None:
            return None
        if isinstance(n_quantizers, bool) or not isinstance(n_quantizers, int):
            raise TypeError(f"n_quantizers: must be an integer, got {n_quantizers!r}")
        if not self.num_semantic < n_quantizers <= self.num_quantizers:
            least = self.num_semantic + 1
            raise ValueError(f"n_quantizers: must lie in [{least}, {self.num_quantizers}], got {n_quantizers}")
        return n_quantizers - self.num_semantic
