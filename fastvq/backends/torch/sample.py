"""The op `sample` in torch operations.

Perturbed logits are computed in float32, each with a bound on its error; the definition decides among the codes that
may be the largest. docs/streams.md derives the bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq.backends.arithmetic import widen
from fastvq.backends.noise import gumbel, noise_words

from . import search
from .topk_search import write_ranked

NOISE_ERROR = 2e-5
"""Error of the Gumbel noise in float32, which stays below 22, and of its addition."""
RELATIVE_ERROR = 2.0**-19
"""Relative error of the float32 operations on a known score."""


def sample(x: Tensor, codebook: Tensor, *, temperature: float, seed: Tensor, metric: str = "l2") -> Tensor:
    """Implement `fastvq.sample`."""
    indices = x.new_full((*x.shape[:-1], 1), -1, dtype=torch.int64)
    heads = zip(x, codebook, indices, strict=True) if x.dim() == 3 else [(x, codebook, indices)]
    for head, (xh, eh, out) in enumerate(heads):
        sampler = _Sampler(eh, head, temperature, seed.to(x.device), metric)
        # The int64 words of a tile need several tensors of its size.
        rows = max(1, search.tile_elements(x.device) // 4 // min(len(eh), search.TILE_CODES))
        for first in range(0, len(xh), rows):
            sampler.write(xh[first : first + rows], first, out[first : first + rows])
    return indices.squeeze(-1)


def logits_of(scores: Tensor, metric: str) -> Tensor:
    """Return the logits of the scores of `search.scores_by_definition`: -|x - e| or <x, e>."""
    return -scores.sqrt() if metric == "l2" else -scores


class _Sampler:
    """The codebook of one head, prepared, with the key of its noise."""

    def __init__(self, codebook: Tensor, head: int, temperature: float, seed: Tensor, metric: str) -> None:
        self.frame = search.make_frame(codebook, metric)
        self.head, self.temperature, self.seed, self.metric = head, temperature, seed, metric
        # From the frame's units to those of the perturbed logits.
        exponent = self.frame.exponent * (1 if metric == "l2" else 2)
        self.unit = torch.ldexp(torch.ones_like(self.frame.norm), -exponent) / temperature
        self.skipped = ~self.frame.half_norms.isfinite() if metric == "l2" else ~self.frame.usable  # [K]

    def write(self, x: Tensor, first: int, out: Tensor) -> None:
        """Write the indices of the rows x, numbered from `first` on, to `out`."""
        wide = widen(x)
        finite = (wide * 0).sum(1) == 0
        wide = wide.masked_fill(~finite[:, None], 0)
        number = torch.arange(first, first + len(x), device=x.device)
        candidates = self._candidates(wide, finite, number)
        if candidates is None:
            half = len(x) // 2
            self.write(x[:half], first, out[:half])
            self.write(x[half:], first + half, out[half:])
            return
        row, code = candidates
        scores = search.scores_by_definition(wide, row, self.frame.exact, code, self.metric)
        words = torch.stack(noise_words(self.head, number[row], code >> 2, self.seed), -1)
        noise = gumbel(words.gather(1, (code & 3)[:, None]).squeeze(1))
        write_ranked(row, code, -(logits_of(scores, self.metric) / self.temperature + noise), out)

    def _candidates(self, wide: Tensor, finite: Tensor, number: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the pairs (row, code) that may be the largest, or None if they are too many to hold."""
        frame = self.frame
        near, bound = frame.rows(wide)
        bounded = (bound < math.inf) & (self.unit > 1e-30) & (self.unit < 1e30)
        squares = near.double().square().sum(1)
        error = 2 * bound + 2.0**-20 * squares if self.metric == "l2" else bound
        columns = (squares, error.masked_fill(~bounded, 0))
        best = near.new_full((len(near),), -math.inf)
        room, found = max(search.tile_elements(near.device) // 8, 8 * len(near)), []
        for start in range(0, len(frame.codes), search.TILE_CODES):
            tile = slice(start, start + search.TILE_CODES)
            lower, upper = self._ends(near, tile, number, *(column.float()[:, None] for column in columns))
            best = torch.maximum(best, lower.amax(1))
            limit = best.masked_fill(~bounded, -math.inf).masked_fill(~finite, math.inf)
            # A NaN bounds nothing, so its pair stays.
            row, code = (~(upper < limit[:, None]) & finite[:, None]).nonzero(as_tuple=True)
            found.append((row, code + start, upper[row, code]))
            if len(near) > 1 and sum(len(row) for row, _, _ in found) > room:
                return None
        row, code, end = (torch.cat(parts) for parts in zip(*found, strict=True))
        limit = best.masked_fill(~bounded, -math.inf)
        still = ~(end < limit[row]) & ~self.skipped[code]
        row, code = row[still], code[still]
        if len(frame.far_codes):
            also = finite.nonzero().squeeze(1)
            row = torch.cat([row, also.repeat_interleave(len(frame.far_codes))])
            code = torch.cat([code, frame.far_codes.repeat(len(also))])
        return row, code

    def _ends(self, near: Tensor, tile: slice, number: Tensor, squares: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 bounds (lower, upper) [n, t] of the perturbed logits, -infinity for skipped codes."""
        codes = self.frame.codes[tile]
        scores = near.new_empty(len(near), len(codes))
        torch.addmm(self.frame.half_norms[tile], near, codes.T, alpha=-1, out=scores)
        unit = self.unit.float()
        if self.metric == "l2":
            scores = scores.mul_(2).add_(squares).clamp_min_(0).sqrt_()
            # |sqrt(a) - sqrt(b)| <= |a - b| / sqrt(b), and <= sqrt(|a - b|)
            error = error / torch.maximum(scores, error.sqrt()).clamp_min_(torch.finfo(torch.float32).tiny)
        width = unit * (error + RELATIVE_ERROR * scores.abs()) + NOISE_ERROR
        middle = self._noise(number, tile.start, len(codes)).addcmul_(scores, -unit)
        lower, upper = (middle - width).nan_to_num_(-math.inf), middle + width
        return lower.masked_fill_(self.skipped[tile], -math.inf), upper.masked_fill_(self.skipped[tile], -math.inf)

    def _noise(self, number: Tensor, start: int, count: int) -> Tensor:
        """Return the Gumbel noise [n, count] in float32, precise for u near 0 and for u near 1."""
        blocks = torch.arange(start // 4, (start + count + 3) // 4, device=number.device)
        words = torch.stack(noise_words(self.head, number[:, None], blocks, self.seed), -1).flatten(1)
        words = words[:, start % 4 : start % 4 + count]
        from_zero, from_one = ((w.float() + 0.5) * 2.0**-32 for w in (words, 0xFFFFFFFF - words))
        exponential = torch.where(from_one < 0.5, -torch.log1p(-from_one), -from_zero.log())
        return -exponential.log()
