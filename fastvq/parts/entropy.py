"""Entropies of soft assignments to codes: low for each vector, so that it is sure, and high for their mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..binary import binary_assign

FLOOR = 1e-5
"""Probabilities are raised to it before their logarithm is taken, as in vector_quantize_pytorch."""


def entropy(p: Tensor, floor: float = FLOOR) -> Tensor:
    """-sum_k p_k ln max(p_k, floor) along the last dimension, in nats."""
    return -(p * p.clamp_min(floor).log()).sum(-1)


class Entropies(NamedTuple):
    """What an entropy loss is made of, both () in nats."""

    per_sample: Tensor  # mean over the vectors of the entropy of their assignment
    batch: Tensor  # entropy of the mean assignment


def binary_entropies(x: Tensor, mask: Tensor, *, sharpness: float) -> Entropies:
    """The entropies of soft assignments to the corners of a cube, the codes of `LFQ`.

        p_n(s) = softmax_s(sharpness <x_n, s>),   s in {-1, 1}^D
        per_sample = mean_n H(p_n),   batch = H(mean_n p_n)

    Args:
        x: (R, C, D), differentiable; C codebooks, over which both entropies are averaged.
        mask: bool (R,), the vectors that count, in means too. Without any both entropies are zero.
        sharpness: 2 v / temperature, for codes of coordinates -v and v compared by squared distance.

    Memory is O(R 2^(D/2) + 2^D), forward and backward (`fastvq.binary_assign`). With several processes the
    mean assignment is that of all their vectors.

    Source: Yu et al., Language Model Beats Diffusion: Tokenizer is Key to Visual Generation, 2023, equation 4.
    """
    codebooks = x.transpose(0, 1)
    each, mean = binary_assign(codebooks, scale=sharpness, floor=FLOOR, mask=mask.expand(codebooks.shape[:2]))
    count = mask.sum().to(mean.dtype)
    per_sample = each.sum() / (count * len(codebooks)).clamp_min(1)
    return Entropies(per_sample, entropy(mean_over_ranks(mean, count)).mean())


def mean_over_ranks(mean: Tensor, count: Tensor) -> Tensor:
    """The mean over all processes' vectors, from this one's mean (..., K) of `count` () of them. Differentiable."""
    if not distributed.active():
        return mean
    shared = distributed.mean(torch.cat([(mean * count).flatten(), count[None]]))
    return shared[:-1].view_as(mean) / shared[-1].detach().clamp_min(torch.finfo(shared.dtype).tiny)


def random_share(valid: Tensor, share: float) -> Tensor:
    """A random choice of `share` of the rows that are valid (R,), rounded down, but at least one: bool (R,).

    By torch's generator, on the device, without waiting for it.
    """
    if share >= 1 or len(valid) == 0:
        return valid
    count = valid.sum()
    wanted = (count.double() * share).long().clamp_min(1)
    order = torch.randn(len(valid), device=valid.device).masked_fill(~valid, torch.inf).argsort()
    place = (valid.cumsum(0) - 1).clamp_min(0)  # of each row among the valid ones
    return valid & (place[order][place] < wanted)
