"""The op `soft_assign` by definition: the softmax over all codes, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range, chunk_rows, compute_dtype, row_mask, widen

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


def _chosen(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the mask [n, K] of the pairs of a row and the code of its index [n]."""
    return indices[:, None] == torch.arange(logits.shape[1], device=logits.device)


def soft_assign_forward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None = None,
    *,
    metric: str,
    scale: float,
    floor: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.soft_assign_forward`."""
    dtype, (groups, count, _) = compute_dtype(x, codebook), x.shape
    if indices is not None:
        check_index_range(indices, len(codebook))
    maximum, log_sum = (x.new_zeros((groups, count), dtype=torch.float64) for _ in range(2))
    gap = x.new_zeros((groups, 0 if indices is None else count), dtype=torch.float64)
    entropy = x.new_zeros((groups, count if statistics else 0), dtype=torch.float64)
    mean = x.new_zeros((groups, len(codebook) if statistics else 0), dtype=torch.float64)
    for g, part, part_mask, _, _, logits in _pairs(x, codebook, mask, metric, scale):
        largest = logits.amax(1, keepdim=True).masked_fill(~part_mask, 0)
        maximum[g, part] = largest[:, 0]
        log_sum[g, part] = (logits - largest).logsumexp(1).masked_fill(~part_mask[:, 0], 0)
        if indices is not None:
            chosen = _chosen(logits, indices[g, part]) & part_mask
            gap[g, part] = torch.where(chosen, largest - logits, 0).sum(1)
        if statistics:
            p = logits.softmax(1).masked_fill(~part_mask, 0)
            entropy[g, part] = entropy_terms(p, floor).sum(1)
            mean[g] += p.sum(0)
    if statistics:
        mean /= row_mask(x, mask).sum(1, keepdim=True).clamp_min(1)
    return maximum.to(dtype), log_sum.to(dtype), gap.to(dtype), entropy.to(dtype), mean.to(dtype)


def soft_assign_backward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    indices: Tensor | None,
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
    if indices is not None:
        check_index_range(indices, len(codebook))
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
            if indices is not None:
                chosen = _chosen(logits, indices[g, part]) & part_mask & logits.isfinite()
                logit_grad -= logsumexp_grad[g, part, None].double() * chosen
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
