"""The first four moments of a batch, and a loss that holds them to those of a distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """Of each column of a batch, each (d,)."""

    mean: Tensor
    variance: Tensor
    skewness: Tensor
    kurtosis: Tensor


def batch_stats(batch: Tensor, eps: float = 1e-8, counts: Tensor | None = None) -> Moments:
    """Mean, unbiased variance, skewness and excess kurtosis of the columns of a batch (N, d).

        skewness = mean z^3,   kurtosis = mean z^4 - 3,   z = (x - mean) / max(std, eps)

    Rows where counts (N,) is False take no part. With fewer than two rows there is no variance: it is zero.
    """
    here = batch.new_ones(len(batch), 1) if counts is None else counts[:, None].to(batch.dtype)
    if counts is not None:
        batch = torch.where(counts[:, None], batch, 0)
    total = here.sum().clamp_min(1)
    mean = batch.sum(0) / total
    centred = (batch - mean) * here
    variance = centred.square().sum(0) / (total - 1).clamp_min(1)
    # No gradient from a column without spread: that of the square root is infinite there.
    spread = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
    z = centred / spread.clamp_min(eps)
    return Moments(mean, variance, z.pow(3).sum(0) / total, z.pow(4).sum(0) / total - 3)


PRESETS: dict[str, dict[str, float]] = {
    "none": {"l1_weight": 0.0, "l2_weight": 0.0, "l3_weight": 0.0, "l4_weight": 0.0},
    "var": {"l3_weight": 0.0, "l4_weight": 0.0},
    "kurt": {},
    "var_tanh": {"l2_target": 0.8225, "l3_weight": 0.0, "l4_weight": 0.0},
    "var_sigmoid": {"l2_target": 3.29, "l3_weight": 0.0, "l4_weight": 0.0},
    "var_laplace": {"l2_target": 2.0, "l3_weight": 0.0, "l4_weight": 0.0},
}
"""Settings of `VectorNorm` by name. The variances are those of the distributions that FSP squashes by."""


class VectorNorm(nn.Module):
    """Pulls the first four moments of a batch's columns to targets.

        loss = sum_i weight_i mean (moment_i - target_i)^2

    with the moments of `batch_stats`: mean, variance, skewness, excess kurtosis.

    Source: 2602.17133.
    """

    def __init__(
        self,
        l1_target: float = 0.0,
        l1_weight: float = 0.1,
        l2_target: float = 1.0,
        l2_weight: float = 0.07,
        l3_target: float = 0.0,
        l3_weight: float = 0.06,
        l4_target: float = 0.0,
        l4_weight: float = 0.05,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.l1_target, self.l1_weight = l1_target, l1_weight
        self.l2_target, self.l2_weight = l2_target, l2_weight
        self.l3_target, self.l3_weight = l3_target, l3_weight
        self.l4_target, self.l4_weight = l4_target, l4_weight
        self.eps = eps

    def forward(self, z: Tensor, counts: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, the moments by name) of z (N, d), of the rows where counts (N,) is True. The loss of fewer than two
        rows is zero."""
        moments = batch_stats(z, self.eps, counts)
        targets = (self.l1_target, self.l2_target, self.l3_target, self.l4_target)
        weights = (self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight)
        loss = z.new_zeros(())
        for moment, target, weight in zip(moments, targets, weights, strict=True):
            if weight:
                loss = loss + (moment - target).square().mean() * weight
        rows = torch.tensor(len(z)) if counts is None else counts.sum()
        return torch.where(rows > 1, loss, 0), moments._asdict()

    @classmethod
    def build(cls, name: str) -> VectorNorm:
        """That of `PRESETS`."""
        if name not in PRESETS:
            raise ValueError(f"vector_norm: must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])
