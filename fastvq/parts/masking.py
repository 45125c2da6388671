"""Masks of rows, and what is done with the rows that a mask excludes."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_mask(rows: Tensor) -> Tensor:
    """Return the mask (...) of rows (..., D) that hold neither NaN nor infinity."""
    rows = rows.detach()
    if torch.compiler.is_exporting():
        return rows.isfinite().all(-1)  # onnxruntime's maximum ignores NaN
    return rows.abs().amax(-1).isfinite()


def exclude_non_finite(rows: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return rows (..., D) with excluded rows set to zero, and the mask (...) of the others.

    A row is excluded if it is not finite or `mask` (...) is False for it. Excluded rows pass no gradient and spoil no
    other gradient: without the zeros, a zero gradient times NaN would be NaN.
    """
    finite = finite_mask(rows)
    mask = finite if mask is None else finite & mask
    return torch.where(mask.unsqueeze(-1), rows, 0), mask


def nan_fill(rows: Tensor, mask: Tensor) -> Tensor:
    """Return rows (..., D) with NaN where mask (...) is False.

    It marks excluded rows again after a projection or normalization, so that the search gives them index -1. They pass
    no gradient.
    """
    return torch.where(mask.unsqueeze(-1), rows, torch.nan)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean () of the elements of values (..., D) over the rows in `mask`, or 0 if there are none.

    The mask broadcasts to (...).
    """
    mask = mask.expand(values.shape[:-1])
    elements = (mask.sum() * values.shape[-1]).clamp_min(1)
    return torch.where(mask.unsqueeze(-1), values, 0).sum() / elements


def feature_major(rows: Tensor) -> Tensor:
    """Return a copy of rows (..., D) in which each feature is contiguous in memory.

    Constants that differ between features are then invariant in long inner loops, which vectorize; elementwise results
    keep the memory order.
    """
    return rows.movedim(-1, 0).contiguous().movedim(0, -1)
