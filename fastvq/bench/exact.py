"""The specification's indices at full size: float64 products, and the definition where these are too close.

The definition of every distance takes minutes at benchmark sizes. A float64 product decides nearly all rows by its
error bound alone; the codes that it can't tell apart are compared by the definition. No backend's code takes part.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-53
"""Unit roundoff of float64."""
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Scores that are computed at once, by device."""


def nearest(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Return the index of the nearest code for each row of x (N, D), by the definition in docs/exactness.md.

    It computes on the device of x, which must have float64, in chunks of rows. Values are float32 or shorter: the
    squares of float64 may overflow.
    """
    usable, included = codebook.isfinite().all(1), x.isfinite().all(1)
    if not usable.any():
        return x.new_full((len(x),), -1, dtype=torch.int64)
    codes = codebook.double().masked_fill(~usable[:, None], 0)
    usable &= _are_first(codes, usable)
    halves = codes.square().sum(1) / 2
    first = (halves if metric == "l2" else torch.zeros_like(halves)).masked_fill(~usable, torch.inf)
    rows = max(1, CHUNK_ELEMENTS[x.device.type] // len(codes))
    values = x.double().masked_fill(~included[:, None], 0)
    found = [_nearest_of(part, codes, first, 2 * halves.max(), metric) for part in values.split(rows)]
    return torch.cat(found).masked_fill(~included, -1)


def _are_first(codes: Tensor, usable: Tensor) -> Tensor:
    """Return the mask of the codes without an equal usable code before them, which would win the tie."""
    distinct, group = codes.unique(dim=0, return_inverse=True)
    number = torch.arange(len(codes), device=codes.device).masked_fill(~usable, len(codes))
    lowest = number.new_full((len(distinct),), len(codes)).scatter_reduce_(0, group, number, "amin")
    return number == lowest[group]


def _nearest_of(x: Tensor, codes: Tensor, first: Tensor, largest: Tensor, metric: str) -> Tensor:
    scores = torch.addmm(first, x, codes.T, alpha=-1)
    best, indices = scores.min(1)
    # The product's error, of any order of summation, and the definition's are each below
    # (D + 2) u (|x|^2 + |e|^2); two scores are compared, and all of it is doubled.
    bound = 4 * (x.shape[1] + 4) * UNIT * (x.square().sum(1) + largest)
    close = scores <= (best + 2 * bound)[:, None]
    undecided = (close.sum(1) > 1).nonzero()[:, 0]
    if len(undecided):
        row, code = close[undecided].nonzero(as_tuple=True)
        indices[undecided] = _first_nearest(x[undecided], codes, row, code, metric)
    return indices


def _first_nearest(x: Tensor, codes: Tensor, row: Tensor, code: Tensor, metric: str) -> Tensor:
    """Return for each row the lowest of its codes with the least score; `row` and `code` list the candidates."""
    score = x.new_zeros(len(row))
    for j in range(x.shape[1]):
        if metric == "l2":
            difference = x[row, j] - codes[code, j]
            score += difference * difference
        else:
            score -= x[row, j] * codes[code, j]
    least = score.new_full((len(x),), torch.inf).scatter_reduce_(0, row, score, "amin")
    winners = score == least[row]
    lowest = code.new_full((len(x),), len(codes))
    return lowest.scatter_reduce_(0, row[winners], code[winners], "amin")
