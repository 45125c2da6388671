"""Likelihoods of stored values, and the negative evidence lower bound in bits per dimension."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def discretized_logistic(x: Tensor, mean: Tensor, log_scale: Tensor | float, *, levels: int = 256) -> Tensor:
    """Return -ln p of each value under a logistic distribution, rounded to the levels that a value can have.

        p(x) = F((x + h - mean) / s) - F((x - h - mean) / s),   F(t) = 1 / (1 + e^-t),   h = 1 / (2 (levels - 1))

    with F = 0 at the lower side of the lowest level and F = 1 at the upper side of the highest one, so that the
    probabilities of all levels add up to 1.

    Args:
        x: values in [0, 1], multiples of 1 / (levels - 1).
        mean: of the distribution, broadcasts with x.
        log_scale: ln s, a number or a tensor that broadcasts with x.
        levels: number of levels, at least 2.

    Returns:
        nats, differentiable in mean and log_scale.

    Source: Salimans et al., PixelCNN++, 2017, section 2.1, with one component; Kingma et al. 2016.
    """
    if levels < 2:
        raise ValueError(f"levels: must be at least 2, got {levels}")
    half = 0.5 / (levels - 1)
    scale = log_scale.exp() if isinstance(log_scale, Tensor) else mean.new_tensor(math.exp(log_scale))
    lower, upper = (x - half - mean) / scale, (x + half - mean) / scale
    # F(b) - F(a) = F(b) F(-a) (1 - e^(a - b)), in which no digits cancel.
    above, below = F.logsigmoid(upper), F.logsigmoid(-lower)
    inner = above + below + torch.log(-torch.expm1(-2 * half / scale))
    return -torch.where(x < half, above, torch.where(x > 1 - half, below, inner))


def elbo_bits_per_dimension(nats: Tensor, divergence: Tensor) -> Tensor:
    """Return the negative evidence lower bound of each example in bits for each of its values.

        (sum_i -ln p(x_i | z) + KL(q(z | x) | p(z))) / (D ln 2)

    Args:
        nats: (B, ...), -ln p of the D values of each example.
        divergence: (B,), the KL in nats. That of a VQ-VAE, whose posterior is one grid of indices, is -ln p(indices):
            positions x ln K under the uniform prior, and what it costs to code them under a learned one.
    """
    rows = nats.flatten(1)
    return (rows.sum(1) + divergence) / (rows.shape[1] * math.log(2))
