"""Layouts of batches as rows of vectors, and the split of vectors into heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = {
    0: ("(B, dim)", "(B, dim)"),
    1: ("(B, N, dim)", "(B, dim, N)"),
    2: ("(B, H, W, dim)", "(B, dim, H, W)"),
    3: ("(B, T, H, W, dim)", "(B, dim, T, H, W)"),
}


Options = Mapping[tuple[bool, int], str]
"""The option that accepts a layout, by (channels first, number of spatial axes)."""

CHANNEL_LAST: Options = {
    (True, 1): "channel_last=False",
    (True, 2): "accept_image_fmap=True",
    (True, 3): "accept_3d_fmap=True",
    (False, 1): "channel_last=True",
    (False, 2): "channel_last=True",
    (False, 3): "channel_last=True",
}
"""Those of a layer that is set for sequences."""

IMAGES: Options = {
    (True, 1): "accept_image_fmap=False and channel_last=False",
    (True, 3): "accept_image_fmap=False and accept_3d_fmap=True",
    (False, 1): "accept_image_fmap=False",
    (False, 2): "accept_image_fmap=False",
    (False, 3): "accept_image_fmap=False",
}
"""Those of a layer that is set for images."""

VIDEO: Options = {
    (True, 1): "accept_3d_fmap=False and channel_last=False",
    (True, 2): "accept_3d_fmap=False and accept_image_fmap=True",
    (False, 1): "accept_3d_fmap=False",
    (False, 2): "accept_3d_fmap=False",
    (False, 3): "accept_3d_fmap=False",
}
"""Those of a layer that is set for video."""


def channel_first_options(name: str = "channel_first") -> Options:
    """Return the options of a layer with one such argument for any number of spatial axes."""
    return {(first, axes): f"{name}={first}" for first in (True, False) for axes in (1, 2, 3)}


CHANNEL_FIRST = channel_first_options()


def propose_layout(x: Tensor, dim: int, channel_first: bool, options: Options) -> str:
    """Return the end of an error's message: what to do with x, whose channels are at another axis than expected."""
    axes = x.dim() - 2
    if axes not in (1, 2, 3):
        return ""
    for first, size in ((True, x.shape[1]), (False, x.shape[-1])):
        if size == dim and (option := options.get((first, axes))):
            return f": for {SHAPES[axes][first]} set {option}"
    for axis, size in ((1, x.shape[1]), (-1, x.shape[-1])):
        if size == dim and (axis == 1) != channel_first:
            return f": pass x.movedim({axis}, {-1 if axis == 1 else 1})"
    return ""


class Layout(NamedTuple):
    """Layout of a batch of vectors, determined once per call by `Layout.of`.

    | vectors | channels last | channel_first | indices |
    |---|---|---|---|
    | single | (B, dim) | (B, dim) | (B,) |
    | sequences | (B, N, dim) | (B, dim, N) | (B, N) |
    | images | (B, H, W, dim) | (B, dim, H, W) | (B, H, W) |
    | video | (B, T, H, W, dim) | (B, dim, T, H, W) | (B, T, H, W) |

    Between `to_rows` and `from_rows` every batch is rows (B, N, dim), with N the product of the spatial sizes.
    """

    batch: int
    spatial: tuple[int, ...]  # () for single vectors
    channel_first: bool

    @staticmethod
    def of(
        x: Tensor,
        dim: int,
        *,
        channel_first: bool | None = False,
        spatial: tuple[int, ...] | None = None,
        options: Options = MappingProxyType({}),
    ) -> Layout:
        """Return the layout of x after validating its shape and dtype.

        Args:
            x: a batch of vectors, floating point.
            dim: the dimension of the vectors.
            channel_first: whether the channels are the second axis. None: for images and video they are, else not.
            spatial: the supported numbers of spatial axes, such as (0, 1) for single vectors and sequences; by default
                any.
            options: the layer's options that the error's message proposes.

        Raises:
            ValueError: x has another shape. TypeError: x is not floating point.
        """
        if not isinstance(x, Tensor):  # without a call, as each forward pass comes here
            raise TypeError(f"x: must be a tensor, got {type(x).__name__}")
        axes = x.dim() - 2
        if channel_first is None:
            channel_first = axes >= 2
        channel_first = channel_first and axes > 0
        fits = axes >= 0 and (spatial is None or axes in spatial) and x.shape[1 if channel_first else -1] == dim
        if not fits:
            kinds = spatial if spatial is not None else (0, 1, 2, 3)
            shapes = [SHAPES[axes][channel_first] for axes in sorted(kinds, key=lambda axes: (axes != 1, axes))]
            shapes = list(dict.fromkeys(shapes)) if spatial is not None else [*shapes, "..."]
            proposal = propose_layout(x, dim, channel_first, options)
            raise ValueError(f"x: must have shape {' or '.join(shapes)} with dim={dim}, got {tuple(x.shape)}{proposal}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: must be floating point, got {x.dtype}")
        return Layout(x.shape[0], tuple(x.shape[2:] if channel_first else x.shape[1:-1]), channel_first)

    @property
    def rows(self) -> int:
        """N, the number of vectors in one element of the batch."""
        return math.prod(self.spatial)

    def to_rows(self, x: Tensor) -> Tensor:
        """Return x as rows (B, N, dim)."""
        if self.channel_first:
            return x.flatten(2).transpose(1, 2)
        return x if len(self.spatial) == 1 else x.reshape(self.batch, self.rows, x.shape[-1])

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return rows (B, N, ..., dim) in the layout of x; axes between N and dim (top-k) follow the spatial ones."""
        rows = self.indices(rows)
        return rows.movedim(-1, 1) if self.channel_first else rows

    def indices(self, indices: Tensor) -> Tensor:
        """Return indices, or other values of rows, (B, N, ...) as (B, spatial, ...)."""
        if len(self.spatial) == 1:
            return indices
        return indices.reshape(self.batch, *self.spatial, *indices.shape[2:])

    def indices_to_rows(self, indices: Tensor) -> Tensor:
        """Return indices (B, spatial, ...) as (B, N, ...) after validating their shape: the inverse of `indices`."""
        leading = (self.batch, *self.spatial)
        if indices.shape[: len(leading)] != leading:
            raise ValueError(f"indices: must have shape {leading} or ({leading}, ...), got {tuple(indices.shape)}")
        return indices.reshape(self.batch, self.rows, *indices.shape[len(leading) :])

    def rows_mask(self, mask: Tensor | None, lens: Tensor | None = None) -> Tensor | None:
        """Return the mask (B, N) of the rows that take part, or None if all do.

        Args:
            mask: bool (B, spatial): (B, N) for sequences, (B, H, W) for images, (B, T, H, W) for video, (B,) for single
                vectors. True for the vectors that take part.
            lens: int (B,), for sequences: the first lens[b] vectors take part. On the CPU and outside compiled graphs,
                lengths beyond N are refused.

        Raises:
            TypeError, ValueError: both are given, or one of another dtype or shape, or a length is out of range.
        """
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            raise ValueError("mask, lens: only one of them may be given")
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise TypeError(f"mask: must be a bool tensor, got {type(mask).__name__}")
            if mask.dtype != torch.bool:
                raise TypeError(f"mask: must be bool, got {mask.dtype}")
            if mask.shape != (self.batch, *self.spatial):
                raise ValueError(f"mask: must have shape {(self.batch, *self.spatial)}, got {tuple(mask.shape)}")
            return mask.reshape(self.batch, self.rows)
        assert lens is not None
        if len(self.spatial) != 1:
            raise ValueError("lens: is for sequences; images, video and single vectors take a mask")
        if not isinstance(lens, Tensor) or lens.is_floating_point() or lens.dtype == torch.bool:
            got = lens.dtype if isinstance(lens, Tensor) else type(lens).__name__
            raise TypeError(f"lens: must be a tensor of ints, got {got}")
        if lens.shape != (self.batch,):
            raise ValueError(f"lens: must have shape ({self.batch},), got {tuple(lens.shape)}")
        # Reading other devices would wait for them, and a compiled graph can't.
        if type(lens) is Tensor and lens.is_cpu and self.batch and not torch.compiler.is_compiling():
            low, high = (int(found) for found in lens.aminmax())
            if low < 0 or high > self.rows:
                raise ValueError(f"lens: must lie in [0, {self.rows}], the length of x, got {lens.tolist()}")
        return torch.arange(self.rows, device=lens.device) < lens[:, None]


def layout_of(x: Tensor, dim: int, *, channel_last: bool, image: bool, video: bool, single: bool = True) -> Layout:
    """Return the layout of x for a layer with the options channel_last, accept_image_fmap and accept_3d_fmap.

    Without any of them, x has any number of spatial axes, or with `single` False exactly one.
    """
    if image:
        return Layout.of(x, dim, channel_first=True, spatial=(2,), options=IMAGES)
    if video:
        return Layout.of(x, dim, channel_first=True, spatial=(3,), options=VIDEO)
    spatial = None if channel_last and single else (0, 1) if single else (1,)
    return Layout.of(x, dim, channel_first=not channel_last, spatial=spatial, options=CHANNEL_LAST)


def codes_in_layout(codes: Tensor, channel_first: bool) -> Tensor:
    """Return decoded codes (B, spatial, D) with the channels second if `channel_first` and there are spatial axes."""
    return codes.movedim(-1, 1) if channel_first and codes.dim() > 2 else codes


class Heads(NamedTuple):
    """Split of vectors into heads, and of heads over codebooks.

    Vectors (B, N, H D) become rows (C, R, D), with one leading axis for the codebooks: C = H and R = B N for `separate`
    codebooks; C = 1 and R = B H N for one codebook that all heads share. Indices are (B, N, H), or (B, N) for one head.
    """

    number: int = 1
    separate: bool = False

    @property
    def codebooks(self) -> int:
        """C, the number of codebooks."""
        return self.number if self.separate else 1

    def split(self, x: Tensor) -> Tensor:
        """Return vectors (B, N, H D) as rows (C, R, D)."""
        if self.number == 1:
            return x.reshape(1, x.shape[0] * x.shape[1], x.shape[2])
        parts = x.unflatten(-1, (self.number, x.shape[-1] // self.number))  # [B, N, H, D]
        return self._rows(parts)

    def split_indices(self, indices: Tensor) -> Tensor:
        """Return indices (B, N, H), or (B, N) for one head, as (C, R)."""
        if self.number == 1:
            return indices.reshape(1, indices.numel())
        return self._rows(indices.unsqueeze(-1)).squeeze(-1)

    def split_mask(self, mask: Tensor | None) -> Tensor | None:
        """Return a mask (B, N) as (C, R)."""
        return (
            None if mask is None else self.split_indices(mask[..., None].expand(*mask.shape, self.number).squeeze(-1))
        )

    def join(self, rows: Tensor, batch: int, n: int) -> Tensor:
        """Return rows (C, R, ..., D) as vectors (B, N, ..., H D)."""
        if self.number == 1:
            return rows.reshape(batch, n, *rows.shape[2:])
        parts = self._parts(rows, batch, n)  # [B, N, H, ..., D]
        return parts.movedim(2, -2).flatten(-2)

    def join_indices(self, indices: Tensor, batch: int, n: int) -> Tensor:
        """Return indices (C, R, ...) as (B, N, H, ...), or (B, N, ...) for one head."""
        if self.number == 1:
            return indices.reshape(batch, n, *indices.shape[2:])
        return self._parts(indices, batch, n)

    def _rows(self, parts: Tensor) -> Tensor:
        """Return (B, N, H, D) as (C, R, D)."""
        if self.separate:
            return parts.movedim(2, 0).flatten(1, 2)
        return parts.transpose(1, 2).flatten(0, 2)[None]

    def _parts(self, rows: Tensor, batch: int, n: int) -> Tensor:
        """Return (C, R, ...) as (B, N, H, ...)."""
        if self.separate:
            return rows.reshape(self.number, batch, n, *rows.shape[2:]).movedim(0, 2)
        return rows.reshape(batch, self.number, n, *rows.shape[2:]).transpose(1, 2)


def offset_indices(indices: Tensor, size: int) -> Tensor:
    """Return indices (C, R, ...) into C codebooks as indices (C R, ...) into their concatenation (C K, D); -1 stays."""
    if len(indices) > 1:
        starts = torch.arange(0, len(indices) * size, size, device=indices.device)
        indices = torch.where(indices < 0, -1, indices + starts.view(-1, *[1] * (indices.dim() - 1)))
    return indices.flatten(0, 1)
