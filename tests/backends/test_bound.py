"""The certified bound of docs/exactness.md, held against exact rational arithmetic.

Every score t of the cheap pass must lie within B of s^ = c^2 d^ / 2 - |y|^2 / 2, with d^ the float64 value of the
definition, whichever way a device computes t.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastvq.backends.torch import search

from ..cases import ADVERSARIAL, DTYPES, METRICS, generator, mismatch

FINITE = [name for name in ADVERSARIAL if "non_finite" not in name]
# Magnitudes too far apart for a bound: the definition decides among all codes.
UNBOUNDED = {"huge_vectors_tiny_codes", "largest_vectors"}


def defined_score(row, code, metric):
    score = 0.0
    for a, b in zip(row, code, strict=True):
        score += (a - b) * (a - b) if metric == "l2" else -(a * b)
    return Fraction(score)


def exact_scores(x, codebook, frame, metric):
    """Return s^ (N, K) as fractions."""
    scale, center = Fraction(2) ** int(frame.exponent), [Fraction(m) for m in frame.center.tolist()]
    scores = []
    for row in x.double().tolist():
        defined = [scale**2 * defined_score(row, code, metric) for code in codebook.double().tolist()]
        if metric == "l2":
            square = scale**2 * sum((Fraction(a) - m) ** 2 for a, m in zip(row, center, strict=True))
            defined = [(d - square) / 2 for d in defined]
        scores.append(defined)
    return scores


def library_scores(near, codes, half_norms):
    return torch.addmm(half_norms, near, codes.T, alpha=-1)


def chained_from_the_half_norm(near, codes, half_norms):
    """Compute scores as one float32 chain from the half norm, to which every later rounding is relative."""
    total = half_norms.numpy()[None].repeat(len(near), 0)
    for a, b in zip(near.numpy().T, codes.numpy().T, strict=True):
        total = total - np.multiply.outer(a, b)
    return torch.from_numpy(total)


def leading_bits(values, count):
    """Round to `count` significant bits, as tf32 (11) and bfloat16 (8) do."""
    mantissa, exponent = np.frexp(values.double().numpy())
    return torch.from_numpy(np.ldexp(np.round(np.ldexp(mantissa, count)), exponent - count)).float()


def truncated(value, quantum):
    return math.trunc(value / quantum) * quantum


def magnitude(value):
    """Return the exponent of a fraction's leading bit."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if abs(value) >= Fraction(2) ** exponent else exponent - 1


def tensor_core_scores(near, codes, half_norms, block=8, guard=1):
    """Compute scores as tensor cores do, by default those of an A100 on 16-bit operands.

    They align a block of exact products and the accumulator to the largest of them, cut the bits below, and cut their
    sum to float32; see Khattak and Mikaitis, arXiv 2512.07004.
    """
    scores = torch.empty(len(near), len(codes))
    for n, row in enumerate(near.tolist()):
        for k, code in enumerate(codes.tolist()):
            total = Fraction(0)
            products = [-Fraction(a) * Fraction(b) for a, b in zip(row, code, strict=True)]
            for first in range(0, len(products), block):
                terms = [t for t in (total, *products[first : first + block]) if t]
                if terms:
                    top = max(map(magnitude, terms))
                    total = sum(truncated(t, Fraction(2) ** (top - 23 - guard)) for t in terms)
                if total:
                    total = truncated(total, Fraction(2) ** (magnitude(total) - 23))
            scores[n, k] = half_norms[k] + torch.tensor(float(total))
    return scores


# name: (float32 matmul precision, significant bits of the operands, scores)
PASSES = {
    "library": ("highest", None, library_scores),
    "chained": ("highest", None, chained_from_the_half_norm),
    "tf32": ("high", 11, library_scores),
    "bfloat16": ("medium", 8, library_scores),
    "tensor cores": ("medium", 8, tensor_core_scores),
    "tensor cores, tf32": ("high", 11, lambda *arguments: tensor_core_scores(*arguments, block=4)),
}


@pytest.mark.parametrize("cheap_pass", PASSES)
@pytest.mark.parametrize("data", FINITE)
def test_every_score_lies_within_the_bound(data, cheap_pass):
    for metric in METRICS:
        precision, bits, scores = PASSES[cheap_pass]
        torch.set_float32_matmul_precision(precision)
        bounded = 0
        for n, k, d in [(3, 5, 1), (5, 6, 33)]:
            x, codebook = ADVERSARIAL[data](n, k, d, generator())
            frame = search.make_frame(codebook, metric)
            near, bound = frame.rows(x.double())
            operands = (
                (near, frame.codes) if bits is None else (leading_bits(near, bits), leading_bits(frame.codes, bits))
            )
            approximate = scores(*operands, frame.half_norms).tolist()
            for t, s, b in zip(approximate, exact_scores(x, codebook, frame, metric), bound.tolist(), strict=True):
                if b < math.inf:
                    bounded += 1
                    assert all(abs(Fraction(t_k) - s_k) <= Fraction(b) for t_k, s_k in zip(t, s, strict=True))
        assert bounded > 0 or data in UNBOUNDED


def test_a_long_chain_from_a_large_half_norm():
    """Each of many products, just over half an ulp of the half norm, is rounded up to a whole one."""
    code = torch.full((513,), 2.0**-14)
    code[0] = 1.8**0.5
    x = torch.full((1, 513), 1.01 * 2.0**-11)
    x[0, 0] = 0
    codebook = torch.stack([code, -code])
    frame = search.make_frame(codebook, "l2")
    near, bound = frame.rows(x.double())
    t = chained_from_the_half_norm(near, frame.codes, frame.half_norms)[0].tolist()
    s = exact_scores(x, codebook, frame, "l2")[0]
    assert all(bound.item() / 10 < abs(Fraction(a) - b) <= Fraction(bound.item()) for a, b in zip(t, s, strict=True))


@pytest.mark.parametrize("bound", [0.0, 1e-9, 0.3, 1e30, math.inf])
def test_the_limit_lies_two_bounds_above_the_best(bound):
    bounds = torch.tensor([bound] * 2, dtype=torch.float64)
    for best in (0.0, 1.0, -1.0, 1e30, -1e-40, 0.1):
        bests = torch.tensor([best] * 2)
        limit = search._limit(bests, bounds, torch.tensor([True, False])).double()
        assert limit[0] >= bests[0].double() + 2 * bounds[0]
        assert limit[1] == -math.inf


def candidates_a_row(x, codebook):
    frame = search.make_frame(codebook, "l2")
    near, bound = frame.rows(x.double())
    row, _ = search.find_candidates(near, bound, x.isfinite().all(1), frame)
    return torch.bincount(row, minlength=len(x))


@pytest.mark.parametrize(
    ("data", "scale", "shift"),
    [("clustered", 1, 0), ("clustered", 1e-38, 0), ("clustered", 1e18, 0), ("clustered", 1, 10)],
)
def test_the_bound_certifies_clustered_data(data, scale, shift):
    x, codebook = (scale * (t + shift) for t in ADVERSARIAL[data](2000, 512, 64, generator()))
    count = candidates_a_row(x, codebook)
    assert bool((count >= 1).all())
    assert (count == 1).float().mean() > 0.99


@pytest.mark.parametrize("length", [10.0, 1e4, 1e30])
def test_one_outlier_costs_no_certificate(length):
    x, codebook = ADVERSARIAL["clustered"](2000, 512, 64, generator())
    x[x.sub(codebook[7]).norm(dim=1) < 4] = 0
    codebook[7] *= length
    assert (candidates_a_row(x, codebook) == 1).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_are_found_and_nothing_else(dtype):
    """Signs are the highest bits, which a careless hash would let cancel; NaN and both zeros are compared as bits."""
    signs = torch.randint(0, 2, (400, 6), generator=generator()) * 2 - 1.0
    codes = torch.cat([signs, torch.zeros(3, 6), -torch.zeros(3, 6), torch.full((2, 6), math.nan), torch.ones(1, 6)])
    codes = codes.to(dtype)
    rows = [bytes(row.view(torch.uint8).tolist()) for row in codes]
    assert search.copies_of(codes).tolist() == [row in rows[:i] for i, row in enumerate(rows)]


def test_copies_leave_one_candidate():
    x, codebook = ADVERSARIAL["duplicate_codes"](500, 300, 33, generator())
    for frame in (search.make_frame(codebook, metric, drop_copies=True) for metric in METRICS):
        near, bound = frame.rows(x.double())
        row, _ = search.find_candidates(near, bound, x.isfinite().all(1), frame)
        assert torch.bincount(row, minlength=len(x)).float().mean() < 1.1


def test_the_bound_leaves_few_candidates_on_gaussian_data():
    count = candidates_a_row(*ADVERSARIAL["gaussian"](2000, 512, 64, generator()))
    assert (count == 1).float().mean() > 0.98
    assert count.float().mean() < 1.02


@pytest.mark.parametrize(
    ("share", "noticed_on"),
    [
        (0.0, {"rounded_midpoints", "equidistant_codes", "offset_with_outlier"}),
        (0.03, {"offset_with_outlier", "large_vectors"}),
    ],
)
def test_a_wrong_bound_is_noticed(share, noticed_on, monkeypatch):
    """The data of these tests expose a bound that is too small."""
    rows = search.ScaledCodebook.rows

    def too_small(self, x):
        near, bound = rows(self, x)
        return near, torch.where(bound < math.inf, share * bound, bound)

    monkeypatch.setattr(search.ScaledCodebook, "rows", too_small)
    # With fewer codes than FAR_SHARE no outlier is taken out of the cheap pass, so that it stays in the bound.
    shapes = [(63, 60, 33), (300, 400, 64), (200, 70, 513), (2000, 60, 8)]
    for name in noticed_on:
        assert any(mismatch(*ADVERSARIAL[name](*shape, generator()), "torch") for shape in shapes), name


def rounded_to_integers(v, largest_norm):
    """Round as the native int16 tier does: a vector of the largest norm is 37837 steps long."""
    step = largest_norm / 37837
    return (v / step).round() * step


def share_uncertified(x, codebook, cheap):
    """Return the share of rows whose two best scores differ by at most twice the operands' part of the bound."""
    x, codebook = x.double(), codebook.double()
    near, near_codes = cheap(x), cheap(codebook)
    bound = (x - near).norm(dim=1) * codebook.norm(dim=1).max()
    bound += near.norm(dim=1) * (codebook - near_codes).norm(dim=1).max()
    best = (codebook.square().sum(1) / 2 - x @ codebook.T).topk(2, largest=False).values
    return (best[:, 1] - best[:, 0] <= 2 * bound).double().mean().item()


@pytest.mark.parametrize("shape", [(1000, 512, 64), (1000, 8192, 64), (1000, 1024, 8), (1000, 4096, 256)], ids=str)
@pytest.mark.parametrize("data", ["gaussian", "clustered"])
def test_int16_certifies_more_rows_than_bfloat16(data, shape):
    """The figures are those of docs/decisions.md: the reason for the int16 tier of the native backend."""
    x, codebook = ADVERSARIAL[data](*shape, generator())
    norm = max(x.norm(dim=1).max(), codebook.norm(dim=1).max())
    integers = share_uncertified(x, codebook, lambda v: rounded_to_integers(v, norm))
    bfloat16 = share_uncertified(x, codebook, lambda v: v.bfloat16().double())
    print(f"{data} {shape}: rows uncertified by int16 {integers:.2%}, by bfloat16 {bfloat16:.2%}")
    assert integers <= 0.2 * bfloat16
