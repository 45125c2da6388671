"""The op `soft_assign` by definition: the softmax over all codes, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvq.backends.arithmetic import chunk_rows, compute_dtype, row_mask, widen

from .search import scores_by_definition


def entropy_terms(p: Tensor, floor: float) -> Tensor:
    """Return -p ln max(p, floor), which is 0 for p = 0."""
    return -torch.special.xlogy(p, p.clamp_min(floor))


def entropy_slope(p: Tensor, floor: float) -> Tensor:
    """Return the derivative of `entropy_terms`, or 0 for p = floor = 0: it is always multiplied by p."""
    above = (p >= floor) & (p > 0)
    return torch.where(p.clamp_min(floor) > 0, -p.clamp_min(floor).log(), 0) - above.to(p.dtype)


def _pairs(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, scale: float
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the chunks of rows: group, slice, mask [n, 1], x [n, D], |x - e| or 1 [n, K], logits [n, K]."""
    usable = codebook.isfinite().all(1)
    codes = widen(codebook).masked_fill(~usable[:, None], 0)
    mask = row_mask(x, mask) & usable.any()
    rows = chunk_rows(len(codes))
    for g in range(x.shape[0]):
        for first in range(0, x.shape[1], rows):
            part = slice(first, first + rows)
            part_mask = mask[g, part, None]
            own = widen(x[g, part]).masked_fill(~part_mask, 0)
            scores = scores_by_definition(own, codes, "dot" if metric == "dot" else "l2")
            distance = scores.sqrt() if metric == "distance" else torch.ones_like(scores)
            logits = -scale * (distance if metric == "distance" else scores)
            yield g, part, part_mask, own, distance, logits.masked_fill(~usable, -torch.inf)


def soft_assign_forward(
    x: Tensor, codebook: Tensor, mask: Tensor | None, *, metric: str, scale: float, floor: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.soft_assign_forward`."""
    dtype = compute_dtype(x, codebook)
    logsumexp = x.new_zeros(x.shape[:2], dtype=torch.float64)
    entropy = x.new_zeros((x.shape[0], x.shape[1] if statistics else 0), dtype=torch.float64)
    mean = x.new_zeros((x.shape[0], len(codebook) if statistics else 0), dtype=torch.float64)
    for g, part, part_mask, _, _, logits in _pairs(x, codebook, mask, metric, scale):
        logsumexp[g, part] = logits.logsumexp(1).masked_fill(~part_mask[:, 0], 0)
        if statistics:
            p = logits.softmax(1).masked_fill(~part_mask, 0)
            entropy[g, part] = entropy_terms(p, floor).sum(1)
            mean[g] += p.sum(0)
    if statistics:
        mean /= row_mask(x, mask).sum(1, keepdim=True).clamp_min(1)
    return logsumexp.to(dtype), entropy.to(dtype), mean.to(dtype)


def soft_assign_backward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor,
    logsumexp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    code_grad: Tensor | None,
    *,
    metric: str,
    scale: float,
    floor: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Implement `fastvq.ops.soft_assign_backward`."""
    dtype = compute_dtype(x, codebook)
    x_grad = x.new_zeros((*x.shape[:2], x.shape[2] if need_x else 0), dtype=torch.float64)
    codebook_grad = x.new_zeros((len(codebook) if need_codebook else 0, x.shape[2]), dtype=torch.float64)
    codes = widen(codebook).nan_to_num(0, 0, 0)
    count = row_mask(x, mask).sum(1).clamp_min(1)
    for g, part, part_mask, own, distance, logits in _pairs(x, codebook, mask, metric, scale):
        p = logits.softmax(1).masked_fill(~part_mask, 0)
        p_grad = torch.zeros_like(p)
        if entropy_grad is not None:
            p_grad += entropy_grad[g, part, None].double() * entropy_slope(p, floor)
        if mean_grad is not None:
            p_grad += mean_grad[g].double() / count[g]
        if code_grad is not None:
            p_grad += code_grad[g, part].double() @ codes.T
        logit_grad = p * (p_grad - (p * p_grad).sum(1, keepdim=True))
        if logsumexp_grad is not None:
            logit_grad += logsumexp_grad[g, part, None].double() * p
        if metric == "dot":
            towards, away = scale * logit_grad, torch.zeros_like(p)
        else:
            slope = 2 * scale if metric == "l2" else scale / distance
            towards = away = torch.where(distance > 0, slope * logit_grad, 0)
        # d logit / dx = towards e - away x, and with x and e exchanged for the codes.
        if need_x:
            x_grad[g, part] = towards @ codes - away.sum(1, keepdim=True) * own
        if need_codebook:
            codebook_grad += towards.T @ own - away.sum(0)[:, None] * codes
    return x_grad.to(dtype), codebook_grad.to(dtype)
