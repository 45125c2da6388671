"""The op `soft_assign` in torch operations: tiles of logits, an online logsumexp, a backward that recomputes the tiles.

docs/streams.md has the formulae.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype, row_mask

from . import search

NEAR = 2.0**-8
"""Share of |x|^2 below which a squared distance is summed from differences.

There |x|^2 + |e|^2 - 2 <x, e> cancels to too few digits, and subtracting the center may have cost some.
"""

LARGEST_REACH, LARGEST_LOGIT = 2.0**60, 2.0**120
"""Bounds of |x - e| and of logits within which float32 overflows nowhere; beyond them the arithmetic is float64."""

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
        self.center = torch.zeros_like(codes[0])
        if metric != "dot":
            self.center = (codes.sum(0, dtype=torch.float64) / usable.sum().clamp_min(1)).to(self.dtype)
            near = (codes - self.center).masked_fill(~usable[:, None], 0)
            bias = near.square().sum(1).masked_fill(~usable, math.inf)
        else:
            near, bias = codes, torch.zeros_like(codes[:, 0]).masked_fill(~usable, -math.inf)
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


def _fits(x: Tensor, codes: Tensor, mask: Tensor, metric: str, scale: float) -> bool:
    """Return whether no square, product, logit or weight of the rows in the mask overflows float32.

    It waits for the device, as the search for near pairs does; not while a CUDA graph is captured.
    """
    if codes.dtype == torch.float64 or x.numel() == 0:
        return True
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
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
    x: Tensor, codebook: Tensor, mask: Tensor | None, *, metric: str, scale: float, floor: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.soft_assign_forward`."""
    problem = _Problem(x, codebook, mask, metric, scale)
    logsumexp = x.new_zeros(x.shape[:2], dtype=problem.dtype)
    entropy = x.new_zeros((x.shape[0], x.shape[1] if statistics else 0), dtype=problem.dtype)
    mean = x.new_zeros((x.shape[0], len(codebook) if statistics else 0), dtype=problem.dtype)
    for rows in problem.chunks():
        largest = torch.full_like(rows.squares, torch.finfo(problem.dtype).min)
        total = torch.zeros_like(largest)
        for codes in problem.tiles:
            logits = problem.scores(rows, codes).mul_(scale)
            higher = torch.maximum(largest, logits.amax(1, keepdim=True))
            total = total * (largest - higher).exp() + (logits - higher).exp_().sum(1, keepdim=True)
            largest = higher
        own = (largest + total.log()).masked_fill(~rows.mask, 0)
        logsumexp[rows.groups, rows.part] = own.view(rows.shape)
        if not statistics:
            continue
        terms = torch.zeros_like(own)
        for codes in problem.tiles:
            if len(problem.tiles) > 1:
                logits = problem.scores(rows, codes).mul_(scale)
            log_p = logits.sub_(own)
            p = log_p.exp().masked_fill_(~rows.mask, 0)
            mean[rows.groups, codes.place] += p.view(*rows.shape, -1).sum(1)
            terms -= p.mul_(log_p.clamp_min_(_log_floor(floor))).sum(1, keepdim=True)
        entropy[rows.groups, rows.part] = terms.view(rows.shape)
    if statistics:
        mean /= problem.mask.sum(1, keepdim=True).clamp_min(1)
    dtype = problem.result_dtype
    return logsumexp.to(dtype), entropy.to(dtype), mean.to(dtype)


def _log_floor(floor: float) -> float:
    return math.log(floor) if floor > 0 else LEAST


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
    problem = _Problem(x, codebook, mask, metric, scale)
    if problem.dtype != problem.result_dtype:  # the given one is rounded to float32, and p follows from differences
        wide = x.double()
        grads = [None if t is None else t.double() for t in (logsumexp_grad, entropy_grad, mean_grad, code_grad)]
        logsumexp, _, _ = soft_assign_forward(
            wide, codebook, mask, metric=metric, scale=scale, floor=floor, statistics=False
        )
        found = soft_assign_backward(
            wide, codebook, mask, logsumexp, *grads, metric=metric, scale=scale, floor=floor, need_x=need_x,
            need_codebook=need_codebook,
        )  # fmt: skip
        return found[0].to(problem.result_dtype), found[1].to(problem.result_dtype)
    x_grad = x.new_zeros((*x.shape[:2], x.shape[2] if need_x else 0), dtype=problem.dtype)
    codebook_grad = x.new_zeros((len(codebook) if need_codebook else 0, x.shape[2]), dtype=problem.dtype)
    share = None if mean_grad is None else mean_grad / problem.mask.sum(1, keepdim=True).clamp_min(1)
    by_p = any(grad is not None for grad in (entropy_grad, mean_grad, code_grad))

    def pairs(rows: _Rows, codes: _Codes) -> tuple[Tensor, Tensor, Tensor]:
        """Return (s, p, dL/dp) [n, t], without the part of dL/dp that is the same for all codes."""
        scores = problem.scores(rows, codes)
        log_p = (scores * scale).sub_(rows.of(logsumexp)[:, None])
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
        center = torch.zeros_like(rows.squares)  # [n, 1], the sum over k of p dL/dp
        if by_p:
            for codes in problem.tiles:
                _, p, slope = pairs(rows, codes)
                center += p.mul_(slope).sum(1, keepdim=True)
        if logsumexp_grad is not None:
            center -= rows.of(logsumexp_grad)[:, None]
        own = torch.zeros_like(rows.values)
        for codes in problem.tiles:
            scores, p, slope = pairs(rows, codes)
            weight = slope.sub_(center).mul_(p).mul_(scale)  # towards the codes
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
