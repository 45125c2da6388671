"""Losses in addition to the distance to the nearest code: orthogonality, entropies, moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvq import distributed
from fastvq.backends.arithmetic import compute_dtype, half_difference
from fastvq.functional.binary_assign import binary_assign
from fastvq.functional.quantize import rows_of_mask, unit_norm
from fastvq.functional.soft_assign import soft_assign


def orthogonality(codes: Tensor, used: Tensor | None = None, *, most: int | None = None) -> Tensor:
    """Return a penalty on codes that are not orthogonal, independent of their lengths; 0 for orthogonal codes.

        loss = |E' E'^T - 1|_F^2 / K^2 = (|E'^T E'|_F^2 - 2 |E'|_F^2 + K) / K^2,   e' = e / |e|

    averaged over codebooks. The second form needs a D x D matrix: nothing here is K x K. For nonzero codes it equals
    sum_{i,j} (e'_i . e'_j)^2 / K^2 - 1 / K.

    Args:
        codes: (C, K, D), differentiable.
        used: bool (C, K), restricts the loss to these codes; K in the formula is then their number.
        most: use at most this number of codes, chosen at random.

    Returns:
        () float32, or float64; 0 if no code is used.

    Source: Shin, Lee, Lee, Translation-equivariant Image Quantizer for Bi-directional Image-Text Generation, 2021,
    equation 2.
    """
    if used is not None and (used.dtype != torch.bool or used.shape != codes.shape[:-1]):
        raise ValueError(f"used: must be bool {tuple(codes.shape[:-1])}, got {used.dtype} {tuple(used.shape)}")
    if most is not None and most < 1:
        raise ValueError(f"most: must be at least 1, got {most}")
    size = codes.shape[1]
    normed = unit_norm(codes.to(compute_dtype(codes, codes)))
    if most is not None and most < size:
        keys = torch.rand(codes.shape[:-1], device=codes.device)
        if used is not None:
            keys = keys.masked_fill(~used, 2.0)
        chosen = keys.topk(most, dim=-1, largest=False).indices
        normed = normed.gather(1, chosen[..., None].expand(-1, -1, codes.shape[-1]))
        used = None if used is None else used.gather(1, chosen)
        size = most
    if used is None:
        count = normed.new_full((len(codes),), size)
    else:
        normed, count = normed * used[..., None], used.sum(1).to(normed.dtype)
    # Take the smaller Gram matrix: both have the same norm.
    gram = normed.mT @ normed if size > codes.shape[-1] else normed @ normed.mT
    total = gram.square().sum((1, 2)) - 2 * gram.diagonal(dim1=1, dim2=2).sum(1) + count
    return (total / count.square().clamp_min(1)).mean()


def used_codes(indices: Tensor, size: int) -> Tensor:
    """Return the mask (C, K) of the codes that occur in indices (C, R); -1 is ignored."""
    used = indices.new_zeros(len(indices), size + 1, dtype=torch.bool)
    return used.scatter_(1, torch.where(indices < 0, size, indices), True)[:, :size]


def mean_squared_errors(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Return the mean over D of (x - code)^2 for each index, 0 for -1: x and codes (..., D), indices (...).

    Differentiable in both, computed in float32 at least.
    """
    half = half_difference(x, codes.to(compute_dtype(x, codes)), (indices >= 0).unsqueeze(-1))
    return 4 * half.square().mean(-1)


FLOOR = 1e-5
"""Lower bound on probabilities in logarithms, as in vector_quantize_pytorch."""


def entropy(p: Tensor, floor: float = FLOOR) -> Tensor:
    """Return -sum_k p_k ln max(p_k, floor) along the last dimension, in nats."""
    return -(p * p.clamp_min(floor).log()).sum(-1)


class Entropies(NamedTuple):
    """The two parts of an entropy loss, each () in nats."""

    per_sample: Tensor  # mean entropy of the vectors' assignments
    batch: Tensor  # entropy of the mean assignment


def binary_entropies(x: Tensor, mask: Tensor, *, sharpness: float | Tensor) -> Entropies:
    """Return the entropies of soft assignments to the corners of a cube, the codes of `LFQ`.

        p_n(s) = softmax_s(sharpness <x_n, s>),   s in {-1, 1}^D
        per_sample = mean_n H(p_n),   batch = H(mean_n p_n)

    Args:
        x: (R, C, D), differentiable; both entropies are averaged over the C codebooks.
        mask: bool (R,), the vectors that take part, in means too. Both entropies are zero without any.
        sharpness: 2 v / temperature, for codes with coordinates -v and v compared by squared distance.

    Memory is O(R 2^(D/2) + 2^D), forward and backward (`fastvq.binary_assign`). With several processes the mean
    assignment is that of all their vectors.

    Source: Yu et al., Language Model Beats Diffusion: Tokenizer is Key to Visual Generation, 2023, equation 4.
    """
    codebooks = x.transpose(0, 1)
    each, mean = binary_assign(codebooks, scale=sharpness, floor=FLOOR, mask=mask.expand(codebooks.shape[:2]))
    count = mask.sum().to(mean.dtype)
    per_sample = each.sum() / (count * len(codebooks)).clamp_min(1)
    return Entropies(per_sample, entropy(mean_over_ranks(mean, count)).mean())


def assignment_entropies(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    temperature: float | Tensor = 0.01,
    eps: float = 0.0,
    mask: Tensor | None = None,
) -> Entropies:
    """Return the entropies of soft assignments to the codes of a codebook.

        p_nk = softmax_k(s_nk / temperature),   s_nk = -|x_n - e_k|^2 for "l2", <x_n, e_k> for "dot"
        per_sample = mean_n H(p_n),   batch = -sum_k q_k ln(q_k + eps),   q = mean_n p_n

    Args:
        x: (..., D), any floating dtype. codebook: (K, D). Both get gradients.
        metric: "l2", "dot" or "distance", as for `fastvq.soft_assign`.
        temperature: of the softmax, positive.
        eps: added to the mean in its logarithm; 0 gives the exact entropy, LlamaGen and IBQ have 1e-5. With many codes
            it matters: 1 / K is 6e-5 for 16,384.
        mask: bool (...), the vectors that take part, if they are finite. Both entropies are zero without any.

    Memory is O(N D + K D) and a tile, forward and backward (`fastvq.soft_assign`). With several processes the mean
    assignment is that of all their vectors.

    Raises:
        TypeError, ValueError: an invalid argument, by name.

    Source: Yu et al., Language Model Beats Diffusion, 2023, equation 4, with distances to learned codes as in Chang et
    al., MaskGIT, 2022, and LlamaGen (Sun et al. 2024).
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    if not eps >= 0:
        raise ValueError(f"eps: must not be negative, got {eps}")
    rows = x.reshape(-1, x.shape[-1])
    rows_mask = rows.isfinite().all(1)
    if mask is not None:
        rows_mask = rows_mask & rows_of_mask(mask, x.shape[:-1])
    found = soft_assign(rows, codebook, metric=metric, scale=1 / temperature, mask=rows_mask)
    count = rows_mask.sum().to(found.mean.dtype)
    mean = mean_over_ranks(found.mean, count)
    batch = -(mean * (mean + eps).clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return Entropies(found.entropy.sum() / count.clamp_min(1), batch)


def entropy_loss(
    x: Tensor,
    codebook: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    metric: str = "l2",
    temperature: float | Tensor = 0.01,
    eps: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return mean_n H(p_n) - gamma H(mean_n p_n), in nats: low for confident assignments that use all codes equally.

    Args, Source: see `assignment_entropies`. LlamaGen adds 0.1 times it, of unit vectors and with eps=1e-5, to its
    loss.
    """
    found = assignment_entropies(x, codebook, metric=metric, temperature=temperature, eps=eps, mask=mask)
    return found.per_sample - gamma * found.batch


def mean_over_ranks(mean: Tensor, count: Tensor) -> Tensor:
    """Return the mean over all processes' vectors, given this one's mean (..., K) of `count` () vectors.

    Differentiable.
    """
    if not distributed.active():
        return mean
    shared = distributed.mean(torch.cat([(mean * count).flatten(), count[None]]))
    return shared[:-1].view_as(mean) / shared[-1].detach().clamp_min(torch.finfo(shared.dtype).tiny)


def random_subset(mask: Tensor, share: float) -> Tensor:
    """Return a random subset of the rows in mask (R,): `share` of them, rounded down, but at least one; bool (R,).

    It is drawn from torch's generator on the device, without synchronization.
    """
    if share >= 1 or len(mask) == 0:
        return mask
    count = mask.sum()
    wanted = (count.double() * share).long().clamp_min(1)
    order = torch.randn(len(mask), device=mask.device).masked_fill(~mask, torch.inf).argsort()
    place = (mask.cumsum(0) - 1).clamp_min(0)  # rank of each row among those in the mask
    return mask & (place[order][place] < wanted)


class Moments(NamedTuple):
    """Moments of the columns of a batch, each (d,)."""

    mean: Tensor
    variance: Tensor
    skewness: Tensor
    kurtosis: Tensor


def batch_stats(batch: Tensor, eps: float = 1e-8, mask: Tensor | None = None) -> Moments:
    """Return mean, unbiased variance, skewness and excess kurtosis of the columns of a batch (N, d).

        skewness = mean z^3,   kurtosis = mean z^4 - 3,   z = (x - mean) / max(std, eps)

    Rows where mask (N,) is False are excluded. The variance of fewer than two rows is zero.
    """
    weights = batch.new_ones(len(batch), 1) if mask is None else mask[:, None].to(batch.dtype)
    if mask is not None:
        batch = torch.where(mask[:, None], batch, 0)
    total = weights.sum().clamp_min(1)
    mean = batch.sum(0) / total
    centered = (batch - mean) * weights
    variance = centered.square().sum(0) / (total - 1).clamp_min(1)
    # No gradient from a constant column: that of the square root is infinite there.
    spread = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
    z = centered / spread.clamp_min(eps)
    return Moments(mean, variance, z.pow(3).sum(0) / total, z.pow(4).sum(0) / total - 3)


PRESETS: dict[str, dict[str, float]] = {
    "none": {"l1_weight": 0.0, "l2_weight": 0.0, "l3_weight": 0.0, "l4_weight": 0.0},
    "var": {"l3_weight": 0.0, "l4_weight": 0.0},
    "kurt": {},
    "var_tanh": {"l2_target": 0.8225, "l3_weight": 0.0, "l4_weight": 0.0},
    "var_sigmoid": {"l2_target": 3.29, "l3_weight": 0.0, "l4_weight": 0.0},
    "var_laplace": {"l2_target": 2.0, "l3_weight": 0.0, "l4_weight": 0.0},
}
"""Settings of `VectorNorm` by name. The variances are those of the distributions whose CDF FSP applies."""


class VectorNorm(nn.Module):
    """Loss that pulls the first four moments of a batch's columns to targets.

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

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, moments by name) of z (N, d), over the rows where mask (N,) is True.

        The loss of fewer than two rows is zero.
        """
        moments = batch_stats(z, self.eps, mask)
        targets = (self.l1_target, self.l2_target, self.l3_target, self.l4_target)
        weights = (self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight)
        loss = z.new_zeros(())
        for moment, target, weight in zip(moments, targets, weights, strict=True):
            if weight:
                loss = loss + (moment - target).square().mean() * weight
        rows = torch.tensor(len(z)) if mask is None else mask.sum()
        return torch.where(rows > 1, loss, 0), moments._asdict()

    @classmethod
    def build(cls, name: str) -> VectorNorm:
        """Return the `VectorNorm` with the settings of `PRESETS[name]`."""
        if name not in PRESETS:
            raise ValueError(f"vector_norm: must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])
