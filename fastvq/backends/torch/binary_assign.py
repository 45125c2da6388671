"""The op `binary_assign` in torch operations: the softmax over 2^D vectors of signs, in tables of 2^(D/2) entries.

The softmax over all 2^D vectors of signs is a product of D Bernoulli distributions. With the bits split in two halves,

    p_ij = A_i B_j,   ln p_ij = a_i + b_j,   i and j the two halves of the index

so that a row's entropy needs only the two tables, even with a floor: for each i, the j with a_i + b_j below the floor
are a prefix of the sorted b, and all terms are sums over a prefix or a suffix. The mean over the rows is one matrix
product. docs/streams.md has the formulae.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype, row_mask

from .search import tile_elements

TABLES = 16
"""Approximate number of tables in memory at once."""

LEAST = -1e6
"""Finite stand-in for the logarithm of zero, so that its product with a probability of zero is zero."""


@dataclass
class _Half:
    """The tables of half of the dimensions."""

    plus: Tensor  # [n, d] the probability of +1, sigmoid(2 scale x)
    minus: Tensor  # [n, d] the probability of -1
    bits: Tensor  # [2^d, d] 1 where the index has the bit, else 0
    log: Tensor  # [n, 2^d]

    @staticmethod
    def of(logits: Tensor) -> _Half:
        dim = logits.shape[1]
        codes = torch.arange(1 << dim, device=logits.device)
        bits = (codes[:, None] >> torch.arange(dim - 1, -1, -1, device=logits.device) & 1).to(logits.dtype)
        up, down = (torch.nn.functional.logsigmoid(sign * logits).clamp_min(LEAST) for sign in (1, -1))
        log = logits.new_zeros(len(logits), len(bits))
        for j in range(dim):
            log = log + torch.where(bits[:, j] > 0, up[:, j, None], down[:, j, None])
        return _Half(up.exp(), down.exp(), bits, log)

    def slope(self, weights: Tensor) -> Tensor:
        """Return dL/dlogits [n, d] for the products `weights` of each table entry p and dL/dp."""
        with_bit = weights.new_empty(len(weights), self.bits.shape[1])
        without = torch.empty_like(with_bit)
        torch.mm(weights, self.bits, out=with_bit)
        torch.mm(weights, 1 - self.bits, out=without)
        return self.minus * with_bit - self.plus * without


def _entropy(own: Tensor, other: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return two sums over j for each entry i of `own` logarithms a [n, I] beside `other` logarithms b [n, J].

    They are the entropy terms -p_ij max(ln p_ij, ln floor), and the p_ij that are not below the floor.
    """
    order = other.sort(1).values
    p = order.exp()
    zero = p.new_zeros(len(p), 1)
    below = torch.cat([zero, p.cumsum(1)], 1)  # [n, J + 1] sums over prefixes
    above = torch.cat([p.flip(1).cumsum(1).flip(1), zero], 1)
    above_log = torch.cat([(p * order).flip(1).cumsum(1).flip(1), zero], 1)
    log_floor = math.log(floor) if floor > 0 else -math.inf
    first = torch.searchsorted(order, log_floor - own)
    own_p = own.exp()
    unfloored = own_p * above.gather(1, first)
    terms = -own * unfloored - own_p * above_log.gather(1, first)
    if floor > 0:
        terms -= own_p * below.gather(1, first) * log_floor
    return terms, unfloored


def _halves(x: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> tuple[_Half, _Half]:
    logits = (2 * scale * x.to(dtype)).masked_fill(~mask[:, None], 0)
    high = x.shape[1] - x.shape[1] // 2
    return _Half.of(logits[:, :high]), _Half.of(logits[:, high:])


def _rows_at_once(x: Tensor) -> int:
    high = x.shape[2] - x.shape[2] // 2
    return max(1, tile_elements(x.device) // (TABLES << high))


def binary_assign_forward(x: Tensor, mask: Tensor | None, *, scale: float, floor: float) -> tuple[Tensor, Tensor]:
    """Implement `fastvq.ops.binary_assign_forward`."""
    mask, dtype = row_mask(x, mask), compute_dtype(x)
    groups, _, dim = x.shape
    entropy = x.new_zeros(x.shape[:2], dtype=dtype)
    mean = x.new_zeros((groups, 1 << dim - dim // 2, 1 << dim // 2), dtype=dtype)
    rows = _rows_at_once(x)
    for g in range(groups):
        for first in range(0, x.shape[1], rows):
            part = slice(first, first + rows)
            part_mask = mask[g, part]
            high, low = _halves(x[g, part], part_mask, scale, dtype)
            terms, _ = _entropy(high.log, low.log, floor)
            entropy[g, part] = terms.sum(1).masked_fill(~part_mask, 0)
            a = high.log.exp().masked_fill(~part_mask[:, None], 0)
            torch.addmm(mean[g], a.T, low.log.exp(), out=mean[g])
    mean /= mask.sum(1).clamp_min(1)[:, None, None]
    return entropy, mean.flatten(1)


def binary_assign_backward(
    x: Tensor,
    mask: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    *,
    scale: float,
    floor: float,
) -> Tensor:
    """Implement `fastvq.ops.binary_assign_backward`."""
    mask, dtype = row_mask(x, mask), compute_dtype(x)
    groups = x.shape[0]
    x_grad = x.new_zeros(x.shape, dtype=dtype)
    rows = _rows_at_once(x)
    for g in range(groups):
        share = 1 / mask[g].sum().clamp_min(1).to(dtype)
        for first in range(0, x.shape[1], rows):
            part = slice(first, first + rows)
            part_mask = mask[g, part]
            high, low = _halves(x[g, part], part_mask, scale, dtype)
            # Sums of p_ij dL/dp_ij over the other half of the bits.
            by_high, by_low = torch.zeros_like(high.log), torch.zeros_like(low.log)
            if mean_grad is not None:
                matrix = mean_grad[g].reshape(by_high.shape[1], by_low.shape[1])
                a, b = high.log.exp(), low.log.exp()
                torch.mm(b, matrix.T, out=by_high)
                torch.mm(a, matrix, out=by_low)
                by_high *= a * share
                by_low *= b * share
            if entropy_grad is not None:
                weight = entropy_grad[g, part, None]
                for total, own, other in ((by_high, high.log, low.log), (by_low, low.log, high.log)):
                    terms, unfloored = _entropy(own, other, floor)
                    total += weight * (terms - unfloored)
            grad = torch.cat([high.slope(by_high), low.slope(by_low)], 1)
            x_grad[g, part] = (2 * scale * grad).masked_fill(~part_mask[:, None], 0)
    return x_grad
