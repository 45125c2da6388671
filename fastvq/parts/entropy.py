"""Entropies of soft assignments to codes: low for each vector, so that it is sure, and high for their mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import distributed
from fastvq.functional.binary_assign import binary_assign
from fastvq.functional.quantize import rows_of_mask
from fastvq.functional.soft_assign import soft_assign

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


def assignment_entropies(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", temperature: float = 0.01, mask: Tensor | None = None
) -> Entropies:
    """The entropies of soft assignments to the codes of a codebook.

        p_nk = softmax_k(s_nk / temperature),   s_nk = -|x_n - e_k|^2 for "l2", <x_n, e_k> for "dot"
        per_sample = mean_n H(p_n),   batch = H(mean_n p_n)

    Args:
        x: (..., D), any floating dtype. codebook: (K, D). Both get gradients.
        metric: "l2", "dot" or "distance", as for `fastvq.soft_assign`.
        temperature: of the softmax, positive.
        mask: bool (...), the vectors that count, of those that are finite. Without any both entropies are zero.

    Memory is O(N D + K D) and a tile, forward and backward (`fastvq.soft_assign`). With several processes the mean
    assignment is that of all their vectors.

    Raises:
        TypeError, ValueError: what doesn't fit, by name.

    Source: Yu et al., Language Model Beats Diffusion, 2023, equation 4, with distances to learned codes as in Chang et
    al., MaskGIT, 2022, and LlamaGen (Sun et al. 2024).
    """
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    rows = x.reshape(-1, x.shape[-1])
    counted = rows.isfinite().all(1)
    if mask is not None:
        counted = counted & rows_of_mask(mask, x.shape[:-1])
    found = soft_assign(rows, codebook, metric=metric, scale=1 / temperature, mask=counted)
    count = counted.sum().to(found.mean.dtype)
    batch = entropy(mean_over_ranks(found.mean, count), torch.finfo(found.mean.dtype).tiny)
    return Entropies(found.entropy.sum() / count.clamp_min(1), batch)


def entropy_loss(
    x: Tensor,
    codebook: Tensor,
    *,
    gamma: float = 1.0,
    metric: str = "l2",
    temperature: float = 0.01,
    mask: Tensor | None = None,
) -> Tensor:
    """mean_n H(p_n) - gamma H(mean_n p_n): sure of each vector, and all codes in use. () in nats.

    Args, Source: see `assignment_entropies`. LlamaGen adds 0.1 times it, of unit vectors, to its loss.
    """
    found = assignment_entropies(x, codebook, metric=metric, temperature=temperature, mask=mask)
    return found.per_sample - gamma * found.batch


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
