"""Several codes for one vector: each head codes its part of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """How vectors are split into parts, and which codebook codes a part.

    Vectors (B, N, H D) become rows (C, R, D), one axis for the codebooks: with `separate` codebooks C = H and R = B N;
    with one that all heads share, C = 1 and R = B H N. One head is C = 1, R = B N. Indices are (B, N, H), or (B, N) for
    one head.
    """

    number: int = 1
    separate: bool = False

    @property
    def codebooks(self) -> int:
        """C."""
        return self.number if self.separate else 1

    def split(self, x: Tensor) -> Tensor:
        """Vectors (B, N, H D) as rows (C, R, D)."""
        if self.number == 1:
            return x.reshape(1, x.shape[0] * x.shape[1], x.shape[2])
        parts = x.unflatten(-1, (self.number, x.shape[-1] // self.number))  # [B, N, H, D]
        return self._rows(parts)

    def split_indices(self, indices: Tensor) -> Tensor:
        """Indices (B, N, H), or (B, N) for one head, as (C, R)."""
        if self.number == 1:
            return indices.reshape(1, indices.numel())
        return self._rows(indices.unsqueeze(-1)).squeeze(-1)

    def split_mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask (B, N) as (C, R)."""
        return (
            None if mask is None else self.split_indices(mask[..., None].expand(*mask.shape, self.number).squeeze(-1))
        )

    def join(self, rows: Tensor, batch: int, n: int) -> Tensor:
        """Rows (C, R, ..., D) as vectors (B, N, ..., H D)."""
        if self.number == 1:
            return rows.reshape(batch, n, *rows.shape[2:])
        parts = self._parts(rows, batch, n)  # [B, N, H, ..., D]
        return parts.movedim(2, -2).flatten(-2)

    def join_indices(self, indices: Tensor, batch: int, n: int) -> Tensor:
        """Indices (C, R, ...) as (B, N, H, ...), or (B, N, ...) for one head."""
        if self.number == 1:
            return indices.reshape(batch, n, *indices.shape[2:])
        return self._parts(indices, batch, n)

    def _rows(self, parts: Tensor) -> Tensor:
        """(B, N, H, D) as (C, R, D)."""
        if self.separate:
            return parts.movedim(2, 0).flatten(1, 2)
        return parts.transpose(1, 2).flatten(0, 2)[None]

    def _parts(self, rows: Tensor, batch: int, n: int) -> Tensor:
        """(C, R, ...) as (B, N, H, ...)."""
        if self.separate:
            return rows.reshape(self.number, batch, n, *rows.shape[2:]).movedim(0, 2)
        return rows.reshape(batch, self.number, n, *rows.shape[2:]).transpose(1, 2)


def behind_each_other(indices: Tensor, size: int) -> Tensor:
    """Indices (C, R, ...) in one codebook (C K, D) that holds those of all heads (C, K, D), flat: (C R, ...). -1
    stays."""
    if len(indices) > 1:
        starts = torch.arange(0, len(indices) * size, size, device=indices.device)
        indices = torch.where(indices < 0, -1, indices + starts.view(-1, *[1] * (indices.dim() - 1)))
    return indices.flatten(0, 1)
