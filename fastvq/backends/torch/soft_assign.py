"""The op `soft_assign` in torch operations: tiles of logits, an online logsumexp, a backward that recomputes the tiles.

docs/streams.md has the formulae.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range, compute_dtype, row_mask

from . import search

NEAR = 2.0**-8
"""Share of |x|^2 below which a squared distance is summed from differences.

There |x|^2 + |e|^2 - 2 <x, e> cancels to too few digits, and subtracting the center may have cost some.
"""

LARGEST_REACH, LARGEST_LOGIT = 2.0**60, 2.0**120
"""Bounds of |x - e| and of logits within which float32 overflows nowhere; beyond them the arithmetic is float64."""

LARGEST_PRECISE = 2.0**22
"""Bound of the terms of a logit beyond which float32 errs by about one nat, so that the arithmetic is float64."""

LEAST = -1e6
"""Finite stand-in for the logarithm of zero where its factor is zero."""


@dataclass
class _Rows:
    """A chunk of rows: whole groups, or a part of one."""

    groups: slice
    part: slice
    shape: tuple[int, int]  # groups, rows of each
    exact: Tensor  # [n, D], zero in excluded rows
    values: Tensor  # [n, D], the same minus the center
    squares: Tensor  # [n, 1]
    mask: Tensor  # [n, 1]

    def of(self, tensor: Tensor) -> Tensor:
        """Return the elements of a (G, R, ...) tensor that belong to these rows, as (n, ...)."""
        return tensor[self.groups, self.part].flatten(0, 1)


@dataclass
class _Codes:
    """A tile of codes."""

    place: slice
    exact: Tensor  # [t, D], zero for a code that isn't finite
    values: Tensor  # [t, D], the same minus the center
    bias: Tensor  # [t] |e|^2, infinity for a code that isn't finite; for "dot" 0 and -infinity


class _Problem:
    """The rows and codes of one call, in chunks and tiles."""

    def __init__(self, x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, scale: float) -> None:
        self.x, self.metric, self.scale = x, metric, scale
        self.result_dtype = compute_dtype(x, codebook)
        usable = codebook.isfinite().all(1)
        codes = codebook.to(self.result_dtype).masked_fill(~usable[:, None], 0)
        self.mask = row_mask(x, mask) & usable.any()
        self.dtype = self.result_dtype
        if not _fits(x, codes, self.mask, metric, scale):
            self.dtype = torch.float64
            codes = codes.double()
        self.usable = usable
        self.center = torch.zeros_like(codes[0])
        near = codes
        if metric != "dot":
            self.center = (codes.sum(0, dtype=torch.float64) / usable.sum().clamp_min(1)).to(self.dtype)
            near = (codes - self.center).masked_fill(~usable[:, None], 0)
        if self.dtype == torch.float32 and not self._precise(near):
            self.dtype = torch.float64
            codes, near, self.center = codes.double(), codes.double() - self.center.double(), self.center.double()
            near.masked_fill_(~usable[:, None], 0)
        if metric != "dot":
            bias = near.square().sum(1).masked_fill(~usable, math.inf)
        else:
            bias = torch.zeros_like(codes[:, 0]).masked_fill(~usable, -math.inf)
        starts = range(0, len(codes), search.TILE_CODES)
        places = [slice(first, first + search.TILE_CODES) for first in starts]
        self.tiles = [_Codes(place, codes[place], near[place], bias[place]) for place in places]

    def chunks(self) -> Iterator[_Rows]:
        """Yield the rows in chunks that fit a tile."""
        groups, rows, _ = self.x.shape
        most = max(1, search.tile_elements(self.x.device) // len(self.tiles[0].values))
        group_step, row_step = (max(1, most // rows), rows) if 0 < rows <= most else (1, most)
        for group in range(0, groups if rows else 0, group_step):
            for first in range(0, rows, row_step):
                place = slice(group, group + group_step), slice(first, first + row_step)
                own = self.x[place]
                mask = self.mask[place].reshape(-1, 1)
                exact = own.flatten(0, 1).to(self.dtype).masked_fill(~mask, 0)
                values = exact if self.metric == "dot" else (exact - self.center).masked_fill(~mask, 0)
                squares = values.square().sum(1, keepdim=True)
                yield _Rows(*place, (own.shape[0], own.shape[1]), exact, values, squares, mask)

    def _precise(self, near: Tensor) -> bool:
        """Return whether float32 keeps the digits of the logits, given the codes minus the center; see `_fits`."""
        if self.x.numel() == 0 or _captured(self.x):
            return True
        own = (self.x.to(self.dtype) - self.center).masked_fill(~self.mask[..., None], 0)
        largest = [torch.linalg.vector_norm(t, dim=-1).amax() for t in (own, near)]
        row, code = torch.stack(largest).tolist()
        size = {"dot": row * code, "l2": (row + code) ** 2, "distance": row + code}[self.metric]
        return size * self.scale < LARGEST_PRECISE

    def at(self, rows: _Rows, indices: Tensor, codes: _Codes) -> tuple[Tensor, Tensor]:
        """Return the column [n, 1] of each row's index in a tile of codes, clamped, and whether it is there."""
        column = rows.of(indices)[:, None] - codes.place.start
        return column.clamp(0, len(codes.values) - 1), (column >= 0) & (column < len(codes.values)) & rows.mask

    def scores(self, rows: _Rows, codes: _Codes) -> Tensor:
        """Return the scores s [n, t]: -|x - e|, -|x - e|^2 or <x, e>."""
        scores = rows.values.new_empty(len(rows.values), len(codes.values))
        # With out= autocast leaves the product in float32.
        if self.metric == "dot":
            return torch.addmm(codes.bias, rows.values, codes.values.T, out=scores)
        torch.addmm(codes.bias, rows.values, codes.values.T, alpha=-2, out=scores)
        scores += rows.squares
        row, code = (scores < NEAR * rows.squares).nonzero(as_tuple=True)
        pairs = max(1, search.tile_elements(scores.device) // scores.shape[1])
        for r, k in zip(row.split(pairs), code.split(pairs), strict=True):
            scores[r, k] = (rows.exact[r] - codes.exact[k]).square().sum(1)
        return scores.neg_() if self.metric == "l2" else scores.sqrt_().neg_()


def _captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _fits(x: Tensor, codes: Tensor, mask: Tensor, metric: str, scale: float) -> bool:
    """Return whether no square, product, logit or weight of the rows in the mask overflows float32.

    It waits for the device, as the search for near pairs does; not while a CUDA graph is captured.
    """
    if codes.dtype == torch.float64 or x.numel() == 0:
        return True
    if _captured(x):
        return True
    rows = torch.linalg.vector_norm(x.flatten(0, 1).masked_fill(~mask.reshape(-1, 1), 0), math.inf).float()
    row, code = torch.stack([rows, torch.linalg.vector_norm(codes, math.inf)]).tolist()
    root = math.sqrt(x.shape[2])
    reach = (row + code) * root
    if max(reach, 1.0) * scale >= LARGEST_LOGIT:
        return False
    if metric == "dot":
        return row * code * root * root * max(scale, 1.0) < LARGEST_LOGIT
    if metric == "l2":
        return reach < LARGEST_REACH and reach * reach * scale < LARGEST_LOGIT
    return reach < LARGEST_REACH and (reach == 0 or reach > 1 / LARGEST_REACH)


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
    if indices is not None:
        check_index_range(indices, len(codebook))
        if indices.is_cuda:  # without a wait
            torch._assert_async(((indices >= -1) & (indices < len(codebook))).all())
    problem = _Problem(x, codebook, mask, metric, scale)
    (groups, count, _), dtype = x.shape, problem.dtype
    maximum, log_sum = (x.new_zeros((groups, count), dtype=dtype) for _ in range(2))
    gap = x.new_zeros((groups, 0 if indices is None else count), dtype=dtype)
    entropy = x.new_zeros((groups, count if statistics else 0), dtype=dtype)
    mean = x.new_zeros((groups, len(codebook) if statistics else 0), dtype=dtype)
    for rows in problem.chunks():
        largest = torch.full_like(rows.squares, torch.finfo(dtype).min)
        total = torch.zeros_like(largest)
        chosen = None if indices is None else torch.zeros_like(largest)
        for codes in problem.tiles:
            logits = problem.scores(rows, codes).mul_(scale)
            if indices is not None and chosen is not None:
                column, there = problem.at(rows, indices, codes)
                chosen = torch.where(there, logits.gather(1, column), chosen)
            higher = torch.maximum(largest, logits.amax(1, keepdim=True))
            total = total * (largest - higher).exp() + (logits - higher).exp_().sum(1, keepdim=True)
            largest = higher
        largest, own = largest.masked_fill(~rows.mask, 0), total.log_().masked_fill(~rows.mask, 0)
        place = rows.groups, rows.part
        maximum[place], log_sum[place] = largest.view(rows.shape), own.view(rows.shape)
        if indices is not None and chosen is not None:
            gap[place] = (largest - chosen).view(rows.shape).masked_fill(indices[place] < 0, 0)
        if not statistics:
            continue
        terms = torch.zeros_like(own)
        for codes in problem.tiles:
            if len(problem.tiles) > 1:
                logits = problem.scores(rows, codes).mul_(scale)
            log_p = logits.sub_(largest).sub_(own)
            p = log_p.exp().masked_fill_(~rows.mask, 0)
            mean[rows.groups, codes.place] += p.view(*rows.shape, -1).sum(1)
            terms -= p.mul_(log_p.clamp_min_(_log_floor(floor))).sum(1, keepdim=True)
        entropy[place] = terms.view(rows.shape)
    if statistics:
        mean /= problem.mask.sum(1, keepdim=True).clamp_min(1)
    maximum, log_sum, gap, entropy, mean = (t.to(problem.result_dtype) for t in (maximum, log_sum, gap, entropy, mean))
    return maximum, log_sum, gap, entropy, mean


def _log_floor(floor: float) -> float:
    return math.log(floor) if floor > 0 else LEAST


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
    if indices is not None:
        check_index_range(indices, len(codebook))
    problem = _Problem(x, codebook, mask, metric, scale)
    if problem.dtype != problem.result_dtype:  # the given maximum is rounded to float32, and p follows from differences
        wide = x.double()
        grads = [None if t is None else t.double() for t in (logsumexp_grad, entropy_grad, mean_grad, code_grad)]
        options: dict[str, Any] = {"metric": metric, "scale": scale, "floor": floor}
        maximum, log_sum, *_ = soft_assign_forward(wide, codebook, mask, **options, statistics=False)
        options |= {"need_x": need_x, "need_codebook": need_codebook}
        found = soft_assign_backward(wide, codebook, mask, maximum, log_sum, indices, *grads, **options)
        return found[0].to(problem.result_dtype), found[1].to(problem.result_dtype)
    x_grad = x.new_zeros((*x.shape[:2], x.shape[2] if need_x else 0), dtype=problem.dtype)
    codebook_grad = x.new_zeros((len(codebook) if need_codebook else 0, x.shape[2]), dtype=problem.dtype)
    share = None if mean_grad is None else mean_grad / problem.mask.sum(1, keepdim=True).clamp_min(1)
    by_p = any(grad is not None for grad in (entropy_grad, mean_grad, code_grad))

    def pairs(rows: _Rows, codes: _Codes) -> tuple[Tensor, Tensor, Tensor]:
        """Return (s, p, dL/dp) [n, t], without the part of dL/dp that is the same for all codes."""
        scores = problem.scores(rows, codes)
        log_p = (scores * scale).sub_(rows.of(maximum)[:, None]).sub_(rows.of(log_sum)[:, None])
        p = log_p.exp().masked_fill_(~rows.mask, 0)
        slope = torch.zeros_like(p)
        if code_grad is not None:
            torch.mm(rows.of(code_grad), codes.values.T, out=slope)
        if entropy_grad is not None:
            least = _log_floor(floor)
            derivative = (log_p >= least).to(p.dtype).add_(log_p.clamp_min_(least))
            slope.addcmul_(derivative, rows.of(entropy_grad)[:, None], value=-1)
        if share is not None:
            slope.view(*rows.shape, -1).add_(share[rows.groups, None, codes.place])
        return scores, p, slope

    for rows in problem.chunks():
        kept = pairs(rows, problem.tiles[0]) if len(problem.tiles) == 1 else None
        center = torch.zeros_like(rows.squares)  # [n, 1], the sum over k of p dL/dp
        if by_p:
            for codes in problem.tiles:
                _, p, slope = kept or pairs(rows, codes)
                center += (p * slope).sum(1, keepdim=True)
        own = torch.zeros_like(rows.values)
        for codes in problem.tiles:
            scores, p, slope = kept or pairs(rows, codes)
            if indices is not None and logsumexp_grad is not None:
                # p - 1 before all else: where p is 1, nothing is left of a pull of 1e38.
                column, there = problem.at(rows, indices, codes)
                there &= problem.usable[codes.place][column]
                apart = p.scatter(1, column, p.gather(1, column) - there.to(p.dtype))
            else:
                apart = p
            weight = apart * (0.0 if logsumexp_grad is None else rows.of(logsumexp_grad)[:, None])  # towards the codes
            if by_p:
                weight.addcmul_(p, slope.sub_(center))
            weight.mul_(scale)
            if metric == "l2":
                weight *= 2
            elif metric == "distance":
                weight.div_(scores.neg_()).masked_fill_(scores == 0, 0)
            if need_x:
                torch.addmm(own, weight, codes.values, out=own)
                if metric != "dot":
                    own -= weight.sum(1, keepdim=True) * rows.values
            if need_codebook:
                target = codebook_grad[codes.place]
                torch.addmm(target, weight.T, rows.values, out=target)
                if metric != "dot":
                    target -= weight.sum(0)[:, None] * codes.values
        if need_x:
            x_grad[rows.groups, rows.part] = own.view(*rows.shape, -1)
    return x_grad, codebook_grad
