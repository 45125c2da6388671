"""Soft assignments, pair by pair, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where an argument is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def valid_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which rows (...) of x (..., D) count: those that are finite and not masked out."""
    finite = x.isfinite().all(-1)
    return finite if mask is None else finite & mask


def entropy_terms(p: Tensor, floor: float) -> Tensor:
    """-p ln max(p, floor), 0 for p = 0."""
    return -torch.special.xlogy(p, p.clamp_min(floor))


def entropy_slope(p: Tensor, floor: float) -> Tensor:
    """Its derivative, 0 where p is 0 and the floor is too: it only ever meets a factor p."""
    counted = (p >= floor) & (p > 0)
    return torch.where(p.clamp_min(floor) > 0, -p.clamp_min(floor).log(), 0) - counted.to(p.dtype)
