"""The op `accumulate`: counts and sums of a scalar loop, to the last bit, on every backend and number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvq
from fastvq.backends import reference

from .. import cases
from ..cases import DTYPES, generator


def by_definition(x, indices, size):
    """Add the rows in float64 over ascending n and round to float32 once."""
    counts, sums = np.zeros(size), np.zeros((size, x.shape[1]))
    for row, k in zip(x.double().numpy(), indices.tolist(), strict=True):
        if k >= 0:
            counts[k] += 1
            sums[k] += row
    return torch.from_numpy(counts).float(), torch.from_numpy(sums).float()


def accumulate_by(backend, x, indices, size):
    with fastvq.use_backend(backend):
        return fastvq.accumulate(x, indices, size)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def uniform(n, k, g):
    return torch.randint(-1, k, (n,), generator=g)


def skewed(n, k, g):
    return (k * torch.rand(n, generator=g) ** 8).long().clamp_max(k - 1)


def one_code(n, k, g):
    return torch.full((n,), k - 1)


def excluded(n, k, g):
    return torch.full((n,), -1)


INDICES = {f.__name__: f for f in (uniform, skewed, one_code, excluded)}


@pytest.mark.parametrize("kind", INDICES)
@pytest.mark.parametrize("shape", [*cases.SHAPES, (300, 7, 70), (0, 5, 3), (9, 500, 1)], ids=str)
def test_is_the_definition(shape, kind, backend):
    for dtype in DTYPES:
        n, k, d = shape
        x = (1e3 * torch.randn(n, d, generator=generator())).to(dtype)
        indices = INDICES[kind](n, k, generator(1))
        expected = by_definition(x, indices, k)
        assert_same(reference.accumulate(x, indices, k), expected)
        assert_same(accumulate_by(backend, x, indices, k), expected)


@given(n=st.integers(0, 200), k=st.integers(1, 40), d=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_shape(n, k, d, seed):
    x, indices = torch.randn(n, d, generator=generator(seed)), uniform(n, k, generator(seed))
    expected = by_definition(x, indices, k)
    for backend in cases.BACKENDS:
        assert_same(accumulate_by(backend, x, indices, k), expected)


def test_threads_change_no_bit(backend):
    for kind in INDICES:
        x, indices = torch.randn(5000, 33, generator=generator()), INDICES[kind](5000, 64, generator(1))
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(accumulate_by(backend, x, indices, 64))
        assert_same(*results)


def test_sums_are_rounded_once(backend):
    """In float32 the ones would vanish beside 2^25."""
    x = torch.tensor([2.0**25, *[1.0] * 64, -(2.0**25)])[:, None]
    _, sums = accumulate_by(backend, x, torch.zeros(66, dtype=torch.int64), 1)
    assert sums.item() == 64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_excluded_row_may_hold_anything(bad, backend):
    x = torch.randn(20, 4, generator=generator())
    indices = uniform(20, 3, generator(1))
    indices[5] = -1
    expected = by_definition(x, indices, 3)
    x[5] = bad
    assert_same(accumulate_by(backend, x, indices, 3), expected)


def test_rows_in_several_chunks(monkeypatch):
    x, indices = torch.randn(100, 9, generator=generator()), uniform(100, 5, generator(1))
    monkeypatch.setattr("fastvq.backends.arithmetic.CHUNK_ELEMENTS", 40)
    assert_same(reference.accumulate(x, indices, 5), by_definition(x, indices, 5))


def test_layouts(backend):
    x, indices = torch.randn(50, 6, generator=generator()), uniform(50, 8, generator(1))
    expected = by_definition(x, indices, 8)
    for name, other in cases.layouts(x):
        assert_same(accumulate_by(backend, other, indices, 8), expected), name
    assert_same(accumulate_by(backend, x, torch.stack([indices, indices], 1)[:, 1], 8), expected)
    assert_same(accumulate_by(backend, x[:1].expand(50, 6), indices, 8), by_definition(x[:1].expand(50, 6), indices, 8))


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_an_index_out_of_range_is_named(bad, backend):
    with pytest.raises(IndexError, match=rf"indices: must lie in \[-1, 4\), got {bad}"):
        accumulate_by(backend, torch.zeros(3, 2), torch.tensor([0, bad, 1]), 4)
