"""Which rows count: those that are finite and not masked out."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows (..., D) hold neither NaN nor infinity, bool (...)."""
    rows = rows.detach()
    if torch.compiler.is_exporting():
        return rows.isfinite().all(-1)  # onnxruntime's maximum passes over NaN
    return rows.abs().amax(-1).isfinite()


def keep_finite(rows: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rows with zeros where a row doesn't count, bool whether it does) of rows (..., D).

    A row counts if it is finite and in `mask` (...). The others pass no gradient, and poison none: zero times NaN is
    NaN.
    """
    counts = finite_rows(rows)
    if mask is not None:
        counts = counts & mask
    return torch.where(counts.unsqueeze(-1), rows, 0), counts


def mark_bad(rows: Tensor, counts: Tensor) -> Tensor:
    """Rows (..., D) with NaN where one doesn't count, bool (...): behind a projection or a normalisation, this tells
    that no code is theirs. They pass no gradient."""
    return torch.where(counts.unsqueeze(-1), rows, torch.nan)


def columns(rows: Tensor) -> Tensor:
    """A copy of rows (..., D) in which each column is contiguous: what differs between columns is then a constant of
    long inner loops, which vectorise; elementwise results keep the order."""
    return rows.movedim(-1, 0).contiguous().movedim(0, -1)


def mean_of_rows(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of values (..., D) over the elements of the rows that count, bool that broadcasts to (...); (), and 0
    where none does."""
    counts = counts.expand(values.shape[:-1])
    elements = (counts.sum() * values.shape[-1]).clamp_min(1)
    return torch.where(counts.unsqueeze(-1), values, 0).sum() / elements
