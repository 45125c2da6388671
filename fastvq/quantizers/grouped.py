"""Residual quantizers for groups of channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from fastvq.codebook.fit import Fitted, refuse_frozen
from fastvq.codebook.health import Monitored
from fastvq.parts.arguments import check_sizes, check_tensors, in_the_name_of
from fastvq.parts.dropout import common_seed
from fastvq.parts.shapes import CHANNEL_LAST, IMAGES, VIDEO, Options, channel_first_options, propose_layout

from .residual import SharedSetting, SharedState
from .residual_vq import ResidualVQ


class Grouped(SharedState, Monitored, nn.Module):
    """Base of quantizers that split the channels into groups with a residual quantizer each.

    A subclass names the class of the groups' quantizers as `quantizer`. It is constructed from `dim` and the result of
    `group_settings`; its forward takes `return_all_codes`, `rand_quantize_dropout_fixed_seed` and the options that the
    subclass passes on. Quantize dropout leaves out the same stages in every group. State: `rvqs`.

    Args:
        dim: dimension of the vectors, a multiple of groups.
        groups: G.
        accept_image_fmap: the channels are the second axis of x, as they are with the options of the groups' quantizers
            that say so.
        settings: arguments of every group's quantizer.

    Raises:
        ValueError: dim is not a multiple of groups.
    """

    quantizer: ClassVar[type[Any]]
    _options: Options = channel_first_options("accept_image_fmap")

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **settings: Any) -> None:
        super().__init__()
        check_sizes(dim=dim, groups=groups)
        if dim % groups:
            raise ValueError(f"groups: must divide dim={dim}, got {groups}")
        self.dim, self.groups = dim, groups
        self.accept_image_fmap = accept_image_fmap
        settings = self.group_settings(**settings)
        with in_the_name_of(self):
            self.rvqs = nn.ModuleList([self.quantizer(dim=dim // groups, **settings) for _ in range(groups)])

    def group_settings(self, **settings: Any) -> dict[str, Any]:
        """Return the arguments of a group's quantizer except dim."""
        return {"accept_image_fmap": self.accept_image_fmap, **settings}

    @property
    def _groups(self) -> list[Any]:
        return list(self.rvqs)

    @property
    def _monitored(self) -> list[Monitored]:
        return self._groups

    @property
    def split_dim(self) -> int:
        """The axis of the channels."""
        return 1 if self._channel_first else -1

    @property
    def _channel_first(self) -> bool:
        return bool(self.accept_image_fmap or self._groups[0]._channel_first)

    @property
    def codebooks(self) -> Tensor:
        """The codes of all groups, (G, Q, K, D / G)."""
        return torch.stack([rvq.codebooks for rvq in self._groups])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (G, Q, B, ..., D / G) of indices (G, B, ..., Q)."""
        self._check_groups(indices)
        return torch.stack([rvq.get_codes_from_indices(i) for rvq, i in zip(self._groups, indices, strict=True)])

    def get_output_from_indices(
        self, indices: Tensor, *, n_quantizers: int | Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Return the quantized output of `forward` for indices (G, B, ..., Q).

        n_quantizers, start: as for `forward`: only the stages from start to n_quantizers - 1 take part.
        """
        self._check_groups(indices)
        outputs = [
            rvq.get_output_from_indices(i, n_quantizers=n_quantizers, start=start)
            for rvq, i in zip(self._groups, indices, strict=True)
        ]
        return torch.cat(outputs, dim=self.split_dim)

    def encode(self, x: Tensor, **options: Any) -> Tensor:
        """Return the indices alone, (G, B, ..., Q), with the options of the groups' `encode`. No state changes."""
        return torch.stack(
            [rvq.encode(part, **options) for rvq, part in zip(self._groups, self._split(x), strict=True)]
        )

    def quantize_groups(self, x: Tensor, indices: Any = (), **forward: Any) -> tuple[Any, ...]:
        """Quantize each group, and return quantized as x and the other results of the groups, stacked (G, ...).

        The codes, if requested, are a tuple of (Q, B, ..., D / G), one for each group.
        """
        if self.training and any(getattr(rvq, "quantize_dropout", False) for rvq in self._groups):
            forward["rand_quantize_dropout_fixed_seed"] = common_seed(x)
        if len(indices):
            self._check_groups(indices)
        given = [{"indices": i} for i in indices]
        quantized, *others = zip(
            *(
                rvq(part, **forward, **(chosen or {}))
                for rvq, part, chosen in zip_longest(self._groups, self._split(x), given)
            ),
            strict=True,
        )
        codes = [others.pop()] if forward.get("return_all_codes") else []
        return torch.cat(quantized, dim=self.split_dim), *(torch.stack(other) for other in others), *codes

    def _check_groups(self, indices: Any) -> None:
        if len(indices) != self.groups:
            raise ValueError(f"indices: must be of G={self.groups} groups, got {len(indices)}")

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        check_tensors(x=x)
        if x.dim() < 2 or x.shape[self.split_dim] != self.dim:
            axis = "second" if self._channel_first else "last"
            proposal = propose_layout(x, self.dim, self._channel_first, self._options)
            raise ValueError(f"x: must have dim={self.dim} as its {axis} size, got {tuple(x.shape)}{proposal}")
        return x.chunk(self.groups, dim=self.split_dim)


class GroupedResidualVQ(Grouped):
    """Residual vector quantizer for groups of channels, with the API of vector_quantize_pytorch.

    Args: see `Grouped`; settings are those of `ResidualVQ`.

    Source: Yang et al., HiFi-Codec: Group-residual Vector Quantization, 2023.
    """

    quantizer = ResidualVQ
    decay = SharedSetting("_groups")
    commitment_weight = SharedSetting("_groups")
    sample_codebook_temp = SharedSetting("_groups")

    @property
    def _options(self) -> Options:  # type: ignore[override]
        return IMAGES if self.accept_image_fmap else VIDEO if self._groups[0].accept_3d_fmap else CHANNEL_LAST

    @property
    def freeze_codebook(self) -> bool:
        """True if the codebooks of all groups are frozen; assigning sets it for each of them."""
        return all(rvq.freeze_codebook for rvq in self._groups)

    @freeze_codebook.setter
    def freeze_codebook(self, frozen: bool) -> None:
        for rvq in self._groups:
            rvq.freeze_codebook = frozen

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            x: Tensor,
            indices: None = None,
            return_all_codes: Literal[False] = False,
            sample_codebook_temp: float | None = None,
            freeze_codebook: bool | None = None,
            mask: Tensor | None = None,
            *,
            lens: Tensor | None = None,
            accum_ema_update: bool = False,
            n_quantizers: int | Tensor | None = None,
            start: int = 0,
            codes_gradient: bool = False,
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_all_codes: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]: ...
        @overload
        def __call__(self, x: Tensor, *, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        accum_ema_update: bool = False,
        n_quantizers: int | Tensor | None = None,
        start: int = 0,
        codes_gradient: bool = False,
    ) -> tuple[Any, ...]:
        """Return (quantized, indices, losses) of x, and all codes if requested.

        Args:
            x: (B, N, dim), (B, ..., dim), or (B, dim, H, W) if accept_image_fmap.
            indices: targets (G, B, ..., Q) of the cross entropy; these and the others as for `ResidualVQ`.

        Returns:
            quantized as x; indices (G, B, ..., Q); losses (G, Q); codes, a tuple of G tensors (Q, B, ..., D / G). With
            indices: (quantized, the sum of the groups' cross entropies).
        """
        options = {
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "mask": mask,
            "lens": lens,
            "accum_ema_update": accum_ema_update,
            "n_quantizers": n_quantizers,
            "start": start,
            "codes_gradient": codes_gradient,
        }
        if indices is not None:
            quantized, losses = self.quantize_groups(x, indices, **options)
            return quantized, losses.sum(0)
        return self.quantize_groups(x, return_all_codes=return_all_codes, **options)

    def reinitialize_(self) -> None:
        """Call `ResidualVQ.reinitialize_` of every group."""
        for rvq in self._groups:
            rvq.reinitialize_()

    def resize_(self, codebook_size: int) -> None:
        """Call `ResidualVQ.resize_` of every group."""
        for rvq in self._groups:
            rvq.resize_(codebook_size)

    def fit(
        self, batches: Iterable[Any], *, inputs: Callable[[Any], Tensor] | None = None, iterations: int = 10
    ) -> list[list[Fitted]]:
        """Call `ResidualVQ.fit` of every group, with its channels of the batches; the result has one for each group."""

        def channels(group: int, batch: Any) -> Tensor:
            return self._split(batch if inputs is None else inputs(batch))[group]

        refuse_frozen(stage for rvq in self._groups for stage in rvq._stages)
        return [
            rvq.fit(batches, inputs=partial(channels, group), iterations=iterations)
            for group, rvq in enumerate(self._groups)
        ]

    def commit_ema_update(self) -> None:
        """Call `ResidualVQ.commit_ema_update` of every group."""
        for rvq in self._groups:
            rvq.commit_ema_update()
