"""Residual quantizer of Mimi: semantic stages beside acoustic ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastvq.codebook.fit import Fitted, refuse_frozen
from fastvq.codebook.health import Monitored
from fastvq.distributed import tie_parameters
from fastvq.parts.arguments import check_sizes, check_tensors, in_the_name_of
from fastvq.parts.dropout import ActiveStages

from .residual import SharedSetting
from .residual_vq import ResidualVQ


class Share(NamedTuple):
    """Arguments of one of the two quantizers, those of both in a call."""

    n_quantizers: int | Tensor | None
    start: int


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

    decay = SharedSetting("_stacks")
    commitment_weight = SharedSetting("_stacks")
    sample_codebook_temp = SharedSetting("_stacks")

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
        check_sizes(num_quantizers=num_quantizers, num_semantic=num_semantic)
        if not settings.get("return_zeros_for_masked_padding", True):
            raise ValueError("return_zeros_for_masked_padding: must be True, as the outputs of both stacks are added")
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
        self.acoustic.least_stages = 0  # an item may have semantic stages alone
        self.dim, self.codebook_size = dim, codebook_size
        self.num_quantizers, self.num_semantic = num_quantizers, num_semantic

    @property
    def _stacks(self) -> tuple[ResidualVQ, ResidualVQ]:
        return self.semantic, self.acoustic

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
    def codebooks(self) -> tuple[Tensor, ...]:
        """The codes (K, D) of each stage."""
        return (*self.semantic.codebooks, *self.acoustic.codebooks)

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            mask: Tensor | None = None,
            *,
            return_all_codes: Literal[False] = False,
            lens: Tensor | None = None,
            n_quantizers: int | Tensor | None = None,
            start: int = 0,
            freeze_codebook: bool | None = None,
            accum_ema_update: bool = False,
            codes_gradient: bool = False,
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, mask: Tensor | None = None, *, return_all_codes: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_all_codes: bool = False,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
        freeze_codebook: bool | None = None,
        accum_ema_update: bool = False,
        codes_gradient: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return (quantized, indices, losses) of x, and all codes on request.

        Args:
            x, mask, lens: as for `ResidualVQ`.
            n_quantizers: number of stages that take part, the semantic ones first: for all items of the batch, or int
                (B,) with one for each.
            start: the first stage that takes part: 0, or one of the acoustic stages, num_semantic or later, for x that
                the acoustic stages before have left as residual.
            return_all_codes, codes_gradient, freeze_codebook, accum_ema_update: as for `ResidualVQ`, of both.

        Returns:
            quantized, shaped and typed as x; indices and losses of all stages, the semantic ones first, -1 and zero for
            inactive stages; codes (Q, B, N, D).

        Raises:
            ValueError, TypeError: an invalid argument, by name.
        """
        if codes_gradient and not return_all_codes:
            raise ValueError("codes_gradient: must be False without return_all_codes")
        options: dict[str, Any] = {
            "lens": lens,
            "return_all_codes": return_all_codes,
            "freeze_codebook": freeze_codebook,
            "accum_ema_update": accum_ema_update,
            "codes_gradient": codes_gradient,
        }
        first, second = self._shares(n_quantizers, start, x)
        semantic = (None,) * 4 if first is None else self.semantic(x, mask, **first._asdict(), **options)
        acoustic = (None,) * 4 if second is None else self.acoustic(x, mask, **second._asdict(), **options)
        quantized = [part[0] for part in (semantic, acoustic) if part[0] is not None]
        total = quantized[0] if len(quantized) == 1 else quantized[0] + quantized[1]
        indices = self._all_stages(semantic[1], acoustic[1], self.semantic.stage_axis, -1)
        others = [self._all_stages(*parts, 0, 0) for parts in zip(semantic[2:], acoustic[2:], strict=False)]
        return tie_parameters(self, (total, indices, *others))

    def encode(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return the indices of `forward` in eval mode, with the same arguments. No state changes."""
        first, second = self._shares(n_quantizers, start, x)
        semantic = None if first is None else self.semantic.encode(x, mask, lens=lens, **first._asdict())
        acoustic = None if second is None else self.acoustic.encode(x, mask, lens=lens, **second._asdict())
        return self._all_stages(semantic, acoustic, self.semantic.stage_axis, -1)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (Q, ..., D) of indices, zeros for -1. Indices of the first stages alone suffice."""
        first, rest = self._split(indices)
        acoustic = None if rest is None else self.acoustic.get_codes_from_indices(rest)
        return self._all_stages(self.semantic.get_codes_from_indices(first), acoustic, 0, 0)

    def get_output_from_indices(
        self, indices: Tensor, *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the quantized output of `forward` for these indices, or for those of the first stages alone.

        n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        stack = self.semantic
        chosen = stack._chosen_stages(stack._stages_last(indices), n_quantizers, start)
        first, rest = self._split(stack._stages_out(chosen))
        total = stack.get_output_from_indices(first)
        return total if rest is None else total + self.acoustic.get_output_from_indices(rest)

    def _shares(self, n_quantizers: int | Tensor | None, start: int, x: Tensor) -> tuple[Share | None, Share | None]:
        """Return the arguments of the semantic and of the acoustic quantizer, None for one that takes no part."""
        check_tensors(x=x)
        # Not len(x), which would fix the size of exported batches.
        number = ActiveStages.of_call(n_quantizers, start, items=x.shape[0], stages=self.num_quantizers).number
        first = self.num_semantic
        if 0 < start < first:
            raise ValueError(
                f"start: must be 0 or at least num_semantic={first}: acoustic stages don't quantize what semantic ones"
                f" leave, got {start}"
            )
        later = max(0, start - first)
        if n_quantizers is None:
            return None if start else Share(None, 0), Share(None, later)
        if isinstance(number, Tensor):
            semantic, acoustic = Share(number.clamp_max(first), 0), Share((number - first).clamp_min(0), later)
            return None if start else semantic, acoustic
        semantic, acoustic = Share(min(number, first), 0), Share(number - first, later)
        return None if start else semantic, acoustic if number > first else None

    def _all_stages(self, semantic: Tensor | None, acoustic: Tensor | None, axis: int, fill: float) -> Tensor:
        """Concatenate results of both along the axis of the stages, of which `fill` stands for a missing one."""
        if semantic is None:
            assert acoustic is not None
            semantic = self._absent(self.semantic, acoustic, axis, fill)
        if acoustic is None:
            acoustic = self._absent(self.acoustic, semantic, axis, fill)
        return torch.cat([semantic, acoustic], axis)

    @staticmethod
    def _absent(quantizer: ResidualVQ, like: Tensor, axis: int, fill: float) -> Tensor:
        shape = list(like.shape)
        shape[axis] = quantizer.num_quantizers
        return like.new_full(shape, fill)

    def _split(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the indices of the semantic stages, and those of the acoustic ones, None if there are none."""
        check_tensors(indices=indices)
        axis = self.semantic.stage_axis
        given = indices.shape[axis]
        if not 1 <= given <= self.num_quantizers:
            raise ValueError(f"indices: must have 1 to {self.num_quantizers} stages at axis {axis}, got {given}")
        first, rest = indices.tensor_split([self.num_semantic], axis)
        return first, rest if given > self.num_semantic else None

    def reinitialize_(self) -> None:
        """Call `ResidualVQ.reinitialize_` of both."""
        self.semantic.reinitialize_()
        self.acoustic.reinitialize_()

    def resize_(self, codebook_size: int) -> None:
        """Call `ResidualVQ.resize_` of both."""
        self.semantic.resize_(codebook_size)
        self.acoustic.resize_(codebook_size)
        self.codebook_size = codebook_size

    def fit(
        self, batches: Iterable[Any], *, inputs: Callable[[Any], Tensor] | None = None, iterations: int = 10
    ) -> list[Fitted]:
        """Call `ResidualVQ.fit` of both; the result has one for each stage."""
        refuse_frozen([*self.semantic._stages, *self.acoustic._stages])
        return [
            *self.semantic.fit(batches, inputs=inputs, iterations=iterations),
            *self.acoustic.fit(batches, inputs=inputs, iterations=iterations),
        ]

    def commit_ema_update(self) -> None:
        """Call `ResidualVQ.commit_ema_update` of both."""
        self.semantic.commit_ema_update()
        self.acoustic.commit_ema_update()
