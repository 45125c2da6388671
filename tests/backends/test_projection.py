"""Searches among codes that lie near few directions, which the native backend begins with short vectors.

tests/cpu/check_bound.cpp shows that such codes are searched in this way; here are the data made to mislead it.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastvq
from fastvq.backends import native, reference
from fastvq.codebook import kmeans

from ..cases import DTYPES, METRICS, generator, mismatch

pytestmark = pytest.mark.skipif(not native.build_record()["built"], reason="no native library was built")

N, K, D, RANK = 450, 1100, 33, 4


def rotation(d, g):
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q


def near_few_directions(n, k, g, rest=0.02):
    """Return rows and codes with RANK large coordinates, before a rotation."""
    sizes = torch.full((D,), rest, dtype=torch.float64)
    sizes[:RANK] = 1
    return (torch.randn(rows, D, generator=g, dtype=torch.float64) * sizes for rows in (n, k))


def plain(x, codes, g):
    return x, codes


def rows_beside_them(x, codes, g):
    """All of a row is in the directions that are left out."""
    x[:, :RANK] = 0
    x[:, RANK:] *= 30
    return x, codes


def codes_that_differ_beside_them(x, codes, g):
    codes[:, :RANK] = codes[:3, :RANK].repeat(K // 3 + 1, 1)[:K]
    return x, codes


def equal_lengths_beside_them(x, codes, g):
    """Short vectors that are equal, of codes that are not: signs in the directions that are left out."""
    signs = torch.where(torch.rand(K, D, generator=g) < 0.5, -1.0, 1.0)
    codes[:] = codes[:5].repeat(K // 5, 1)
    codes[:, RANK:] *= signs[:, RANK:]
    return x, codes


def copies(x, codes, g):
    return x, codes[torch.randint(60, (K,), generator=g)]


def offset(x, codes, g):
    return x + 1e4, codes + 1e4


def long_offset_in_one_direction(x, codes, g):
    x[:, 0] += 300
    codes[:, 0] += 300
    return x, codes


def midpoints(x, codes, g):
    first, second = torch.randint(K, (2, N), generator=g)
    return (codes[first] + codes[second]) / 2, codes


def rows_are_codes(x, codes, g):
    return codes[torch.randint(K, (N,), generator=g)].clone(), codes


def crowds(x, codes, g):
    """Crowds of codes nearer to each other than the integers of the scan can tell, and no rest that hides it."""
    codes[:] = codes[:22].repeat(K // 22, 1) + 1e-4 * torch.randn(K, D, generator=g, dtype=torch.float64)
    x = codes[:N] + 0.1 * torch.randn(N, D, generator=g, dtype=torch.float64)
    x[:, RANK:] = 0
    codes[:, RANK:] = 0
    return x, codes


def far_codes(x, codes, g):
    codes[:10] *= 40
    x[:20] *= 30
    return x, codes


def long_rows(x, codes, g):
    x[::7] *= 1e4
    return x, codes


def exactly_few_directions(x, codes, g):
    codes[:, RANK:] = 0
    return x, codes


DATA = [
    plain, rows_beside_them, codes_that_differ_beside_them, equal_lengths_beside_them, copies, offset,
    long_offset_in_one_direction, midpoints, rows_are_codes, crowds, far_codes, long_rows, exactly_few_directions,
]  # fmt: skip


def case(data, seed=0):
    g = generator(seed)
    x, codes = data(*near_few_directions(N, K, g), g)
    turn = rotation(D, g)
    return x @ turn, codes @ turn


@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
def test_equals_the_reference(data):
    for dtype in DTYPES:
        x, codes = (t.to(dtype) for t in case(data))
        for metric in METRICS:
            assert not mismatch(x, codes, "native", metric), f"{dtype}, {metric}"


@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
def test_ranks_equal_the_reference(data):
    """With 20 ranks, one code of a lane is not enough."""
    x, codes = case(data)
    for dtype, metric, k in [(torch.float32, "l2", 2), (torch.float32, "l2", 20), (torch.bfloat16, "dot", 7)]:
        own_x, own_codes = x.to(dtype), codes.to(dtype)
        expected = reference.topk_search(own_x, own_codes, k, metric=metric)
        assert torch.equal(fastvq.topk_search(own_x, own_codes, k, metric=metric), expected), f"{dtype}, {metric}, {k}"


@pytest.mark.parametrize("packed", [False, True])
def test_ranks_of_masked_and_non_finite_rows_among_many_codes(packed):
    g = generator(6)
    x, codes = (t.float() for t in near_few_directions(200, 5000, g))
    x[::17, 3] = math.nan
    codes[::13, 5] = math.inf
    codes[1::2] = codes[::2]
    mask = torch.rand(200, generator=g) < 0.8
    expected = reference.topk_search(x, codes, 60).masked_fill(~mask[:, None], -1)
    found = fastvq.topk_search(x, fastvq.PackedCodebook(codes) if packed else codes, 60, mask=mask)
    assert torch.equal(found, expected)


def test_kmeans_learns_the_same_codes():
    x, _ = (t.float() for t in case(plain))
    learned = []
    for backend in ("native", "torch"):
        torch.manual_seed(0)
        with fastvq.use_backend(backend):
            learned.append(kmeans(x.repeat(4, 1), 700, iterations=2, mask=torch.ones(4 * N, dtype=torch.bool))[0])
    assert torch.equal(*learned)


@pytest.mark.parametrize("scale", [1e-41, 1e-37, 1e-20, 1e15, 1e18])
def test_any_size(scale):
    x, codes = (t.float() * scale for t in case(midpoints))
    assert not mismatch(x, codes, "native")


def test_codes_one_ulp_apart():
    """Codes in crowds that float32 hardly tells apart, and rows among them."""
    _, codes = (t.float() for t in case(plain))
    codes[:] = codes[:4].repeat(K // 4, 1)
    column = torch.randint(D, (K, 1), generator=generator(1))
    codes.scatter_(1, column, torch.nextafter(codes.gather(1, column), torch.tensor(math.inf)))
    x = codes[:N] + 1e-3 * torch.randn(N, D, generator=generator(2))
    assert not mismatch(x, codes, "native")


def test_non_finite_rows_and_codes():
    x, codes = (t.float() for t in case(plain))
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        x[i::17, i] = bad
        codes[i::13, 5 * i] = bad
    for metric in METRICS:
        assert not mismatch(x, codes, "native", metric)


def test_masks_heads_and_splits():
    x, codes = (t.float() for t in case(midpoints))
    expected = reference.search(x, codes)
    mask = torch.rand(N, generator=generator(3)) < 0.8
    assert torch.equal(fastvq.search(x, codes, mask=mask), expected.masked_fill(~mask, -1))
    heads = fastvq.search(torch.stack([x, x.flip(0)]), torch.stack([codes, codes.flip(1)]))
    assert torch.equal(heads[0], expected)
    assert torch.equal(heads[1], reference.search(x.flip(0), codes.flip(1)))
    for size in (1, 150, 449):
        assert torch.equal(torch.cat([fastvq.search(part, codes) for part in x.split(size)]), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(fastvq.search(x.repeat(20, 1), codes), expected.repeat(20))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_stages_of_a_residual_search(packed):
    """The first two stages lie near few directions, the third in all of them."""
    g = generator(5)
    turn = rotation(D, g)
    x, first = (t @ turn for t in near_few_directions(4000, 2048, g))
    near, _ = near_few_directions(2048, 1, g)
    stages = [first.float(), 0.3 * (near @ turn).float(), 0.05 * torch.randn(64, D, generator=g)]
    x = x.float()
    x[::50] = math.nan
    found = fastvq.residual_search(x, fastvq.PackedCodebook(stages) if packed else stages)
    residual = x
    for place, codes in enumerate(stages):
        with fastvq.use_backend("torch"):
            expected = fastvq.search(residual, codes)
        assert torch.equal(found[:, place], expected)
        residual = torch.where((expected >= 0)[:, None], residual - codes[expected.clamp_min(0)], residual)
