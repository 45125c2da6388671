"""The op `search` in torch operations, and the certificate that `topk_search` and `sample` share with it.

The cheap pass is one float32 matrix product for each tile of codes. The bound of docs/exactness.md certifies the rows
for which it leaves one candidate; the float64 definition decides the others. The number of candidates is read once for
each chunk, which waits for the device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.backends.arithmetic import widen

TILE_CODES = 8192
"""Largest number of codes in a tile of scores."""

FAR = 8.0
"""A code is an outlier if its norm exceeds FAR times the median norm."""
FAR_SHARE = 64
"""Outliers are treated apart only if they are at most one code in FAR_SHARE."""

_ODD = -7046029254386353131
"""2^64 over the golden ratio, as int64: its multiples have pseudo-random bits."""

_U = 2.0**-23
"""Relative error of a float32 operation. Tensor cores truncate, which doubles the error of IEEE rounding."""
_V = 2.0**-53
"""Relative error of a float64 operation."""


def tile_elements(device: torch.device) -> int:
    """Return the largest number of elements of a temporary tensor."""
    return 1 << 20 if device.type == "cpu" else 1 << 24


def _operand_unit() -> float:
    """Return the relative error to which a float32 matrix product may round its operands under the user's settings.

    Both settings are read for every device: the wrong one costs certificates, never exactness.
    """
    libraries = (torch.backends.mkldnn, torch.backends.cuda)
    settings = {library.matmul.fp32_precision for library in libraries}
    settings -= {"none", "ieee"}
    if not settings:
        return 0.0
    return 2.0**-10 if settings == {"tf32"} else 2.0**-8


@dataclass
class ScaledCodebook:
    """The codebook of the cheap pass: e' = float32((e - center) 2^exponent)."""

    exact: Tensor  # [K, D] float64, for the definition
    usable: Tensor  # [K] finite, and no dropped copy
    far: Tensor  # [K] outliers, which the cheap pass skips: they would inflate the bound of all rows
    far_norm: Tensor  # [] the smallest norm of an outlier
    center: Tensor  # [D] float64, zero unless centering shrinks the norms
    exponent: Tensor  # [] int32
    codes: Tensor  # [K, D] float32
    half_norms: Tensor  # [K] float32, infinity for a code that can't win
    norm: Tensor  # [] max |e'|
    residual: Tensor  # [] max |e - e'|
    half: Tensor  # [] max |e|^2 / 2
    operand_unit: float

    @functools.cached_property
    def far_codes(self) -> Tensor:
        return self.far.nonzero().squeeze(1)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x' [n, D] in float32 and the bound B(x) [n] in float64 for float64 rows x [n, D].

        Where B is infinite, x' is zero, so that no score is a NaN. docs/exactness.md derives the terms.
        """
        scaled = (x - self.center) * torch.ldexp(torch.ones_like(self.norm), self.exponent)
        near = scaled.float()
        norm = near.double().norm(dim=1)
        residual = (scaled - near).norm(dim=1)
        dim = x.shape[1]
        unit = self.operand_unit
        x_residual = residual * (1 + 1e-9) + (2 * _V + unit) * (norm + residual)
        e_residual = self.residual * (1 + 1e-9) + (2 * _V + unit) * (self.norm + self.residual)
        extent = norm + x_residual + self.norm + e_residual
        gamma = (dim + 2) * _U / (1 - (dim + 2) * _U) if (dim + 2) * _U < 0.25 else math.inf
        operands = x_residual * (self.norm + e_residual) + norm * e_residual
        # The library may add |e|^2 / 2 at any point of the sum.
        accumulation = gamma * (norm * self.norm + self.half)
        half_norms = (2 * _U + dim * 4 * _V) * self.half + _U * (1 + gamma) * norm * self.norm
        definition = (dim + 3) * _V * 0.5 * extent * extent
        tiny = torch.ldexp(torch.full_like(self.norm, float(dim)), 2 * self.exponent - 1074)
        underflow = dim * dim * 2.0**-118 + tiny
        bound = (operands + accumulation + half_norms + definition + underflow) * (1 + 1e-6)
        # Beyond these sizes float32 or the float64 definition itself may overflow, and no bound holds.
        tame = (norm < 2.0**60) & (torch.ldexp(extent, -self.exponent) < 1e150) & (bound < math.inf)
        return near.masked_fill(~tame[:, None], 0), torch.where(tame, bound, math.inf)


def _far_codes(norms: Tensor, usable: Tensor) -> Tensor:
    """Return the mask of the outliers among the usable codes, given their norms; empty if they are too many."""
    median = norms.masked_fill(~usable, math.nan).nanmedian()
    far = usable & (norms > FAR * median) & (median > 0)
    return far & (far.sum() <= len(norms) // FAR_SHARE)


def copies_of(codebook: Tensor) -> Tensor:
    """Return the mask of the codes that are bitwise equal to an earlier one: almost surely all, and never another.

    Equal codes have equal hashes, sums of their bits times pseudo-random numbers, and a stable sort brings them
    together in ascending order.
    """
    bits = codebook.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[codebook.element_size()])
    factors = torch.arange(1, codebook.shape[1] + 1, device=codebook.device) * _ODD
    factors = ((factors ^ (factors >> 29)) * _ODD) | 1
    # Times an odd number, a sign in the highest bit would only change the highest bit of the sum.
    folded = bits.long() ^ (bits.long() >> 32) if bits.dtype == torch.int64 else bits.long()
    hashes, order = (folded * factors).sum(1).sort(stable=True)
    ordered = bits[order]
    equal = (hashes[1:] == hashes[:-1]) & (ordered[1:] == ordered[:-1]).all(1)
    return torch.zeros_like(order, dtype=torch.bool).index_put_((order[1:],), equal)


def make_frame(codebook: Tensor, metric: str, *, drop_copies: bool = False) -> ScaledCodebook:
    """Return the frame of a codebook [K, D].

    A search for the nearest code drops copies: a code that is bitwise equal to an earlier one has its score and loses
    the tie. What ranks or draws codes keeps them.
    """
    exact = widen(codebook)
    usable = exact.isfinite().all(1)
    if drop_copies:
        usable &= ~copies_of(codebook)
    finite = exact.masked_fill(~usable[:, None], 0)
    center = torch.zeros_like(finite[0])
    norms, far = finite.norm(dim=1), torch.zeros_like(usable)
    if metric == "l2":
        far = _far_codes(norms, usable)
        near = usable & ~far
        mean = finite.masked_fill(far[:, None], 0).sum(0) / near.sum().clamp_min(1)
        centered = (finite - mean).norm(dim=1)
        centered_far = _far_codes(centered, usable)
        largest = centered.masked_fill(centered_far | ~usable, 0).amax()
        pays = largest < 0.5 * norms.masked_fill(~near, 0).amax()  # false for an overflow too
        center, far = torch.where(pays, mean, center), torch.where(pays, centered_far, far)
        norms = torch.where(pays, centered, norms)
    scanned = usable & ~far
    moved = (finite - center).masked_fill(~scanned[:, None], 0)
    exponent = (1 - torch.frexp(moved.abs().amax()).exponent).clamp_max(1000)
    moved = torch.ldexp(moved, exponent)
    codes = moved.float()
    half = moved.square().sum(1) / 2 if metric == "l2" else torch.zeros_like(moved[:, 0])
    return ScaledCodebook(
        exact=exact,
        usable=usable,
        far=far,
        far_norm=torch.ldexp(norms.masked_fill(~far, math.inf).amin(), exponent),
        center=center,
        exponent=exponent,
        codes=codes,
        half_norms=half.float().masked_fill(~scanned, math.inf),
        norm=codes.double().norm(dim=1).amax(),
        residual=(moved - codes).norm(dim=1).amax(),
        half=half.amax(),
        operand_unit=_operand_unit(),
    )


def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Implement `fastvq.search`."""
    indices = x.new_full(x.shape[:-1], -1, dtype=torch.int64)
    if x.dim() == 3:
        for xh, eh, out in zip(x, codebook, indices, strict=True):
            out.copy_(search(xh, eh, metric=metric))
        return indices
    frame = make_frame(codebook, metric, drop_copies=True)
    rows = max(1, tile_elements(x.device) // min(len(codebook), TILE_CODES))
    for part, out in zip(x.split(rows), indices.split(rows), strict=True):
        _search_rows(part, frame, metric, out)
    return indices


def _search_rows(x: Tensor, frame: ScaledCodebook, metric: str, out: Tensor) -> None:
    wide = widen(x)
    finite = (wide * 0).sum(1) == 0
    wide = wide.masked_fill(~finite[:, None], 0)
    near, bound = frame.rows(wide)
    candidates = find_candidates(near, bound, finite, frame)
    if candidates is None:
        for part, part_out in zip(x.tensor_split(2), out.tensor_split(2), strict=True):
            _search_rows(part, frame, metric, part_out)
        return
    row, code = candidates
    # A row with one candidate is certified; the definition decides among several.
    out[row] = code
    several = torch.bincount(row, minlength=len(x))[row] > 1
    row, code = row[several], code[several]
    if len(row) == 0:
        return
    scores = scores_by_definition(wide, row, frame.exact, code, metric)
    smallest = scores.new_full((len(x),), math.inf).scatter_reduce_(0, row, scores, "amin")
    tie = scores == smallest[row]
    lowest = torch.full_like(out, len(frame.codes)).scatter_reduce_(0, row[tie], code[tie], "amin")
    out.copy_(torch.where(lowest < len(frame.codes), lowest, out))


def find_candidates(
    near: Tensor, bound: Tensor, finite: Tensor, frame: ScaledCodebook, k: int = 1
) -> tuple[Tensor, Tensor] | None:
    """Return the pairs (row, code) that the cheap pass can't rule out: the k nearest codes of each finite row, or more.

    Return None if the pairs are too many to hold, as with ties everywhere: the caller then takes fewer rows at once.
    """
    nearest = near.new_full((len(near), k), math.inf)
    room = max(tile_elements(near.device) // 8, 8 * k * len(near))
    found = []
    for first in range(0, len(frame.codes), TILE_CODES):
        tile = slice(first, first + TILE_CODES)
        codes, half_norms = frame.codes[tile], frame.half_norms[tile]
        # With out= autocast leaves the product in float32.
        scores = near.new_empty(len(near), len(codes))  # [n, tile]
        torch.addmm(half_norms, near, codes.T, alpha=-1, out=scores)
        nearest = _smallest(nearest, scores)
        row, code = (scores <= _limit(nearest[:, -1], bound, finite)[:, None]).nonzero(as_tuple=True)
        found.append((row, code + first, scores[row, code]))
        if len(near) > 1 and sum(len(row) for row, _, _ in found) > room:
            return None
    row, code, score = (torch.cat(parts) for parts in zip(*found, strict=True))
    # The best scores are known only after the last tile. An unusable code or an outlier scores infinity, which passes
    # the limit only of a row without a bound or with too few other codes.
    limit = _limit(nearest[:, -1], bound, finite)
    still = (score <= limit[row]) & frame.usable[code] & ~frame.far[code]
    row, code = row[still], code[still]
    if len(frame.far_codes):
        # For |f| >= 4 |y|,  |f|^2 / 2 - <y, f> >= |f|^2 / 4, and the definition rounds that by less than a millionth.
        length = near.double().norm(dim=1) * (1 + 1e-6) + 1e-30
        too_far = (frame.far_norm >= 4 * length) & (0.25 * frame.far_norm.square() * (1 - 1e-6) > limit)
        also = (~too_far & (limit > -math.inf)).nonzero().squeeze(1)
        row = torch.cat([row, also.repeat_interleave(len(frame.far_codes))])
        code = torch.cat([code, frame.far_codes.repeat(len(also))])
    return row, code


def _smallest(nearest: Tensor, scores: Tensor) -> Tensor:
    """Return the k smallest of `nearest` [n, k] and `scores` [n, t] in each row, ascending."""
    k = nearest.shape[1]
    if k == 1:
        return torch.minimum(nearest, scores.amin(1, keepdim=True))
    smallest = scores.topk(min(k, scores.shape[1]), largest=False, sorted=False).values
    return torch.cat([nearest, smallest], 1).topk(k, largest=False).values


def _limit(best: Tensor, bound: Tensor, finite: Tensor) -> Tensor:
    """Return the largest score with which a code may still be the nearest, rounded up to float32.

    It is -infinity for a row that isn't finite, and infinity for a row without a bound.
    """
    limit = (best.double() + 2 * bound).float()
    limit = torch.nextafter(limit, torch.full_like(limit, math.inf))
    limit = limit.masked_fill(bound == math.inf, math.inf)
    return limit.masked_fill(~finite, -math.inf)


def scores_by_definition(x: Tensor, row: Tensor, codebook: Tensor, code: Tensor, metric: str) -> Tensor:
    """Return the float64 score of each pair (row, code): a sum in ascending order, each operation rounded by itself."""
    pairs = max(1, (1 << 19) // x.shape[1])
    scores = []
    for r, c in zip(row.split(pairs), code.split(pairs), strict=True):
        score = x.new_zeros(len(r))
        for x_j, e_j in zip(x[r].unbind(1), codebook[c].unbind(1), strict=True):
            if metric == "l2":
                difference = x_j - e_j
                score += difference * difference
            else:
                score -= x_j * e_j
        scores.append(score.masked_fill_(score.isnan(), math.inf))
    return torch.cat(scores) if scores else x.new_empty(0)
