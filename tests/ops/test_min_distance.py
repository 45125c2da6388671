"""The op `min_distance_`, against a scalar loop, on every backend and in every dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvq
from fastvq import ops
from fastvq.backends import reference

from .. import cases
from ..cases import DTYPES, generator
from ..instruction_sets import TIERS, Outcomes


def by_definition(distances, x, codes):
    """Compute in float64 over ascending columns and round to float32 once."""
    result = distances.clone()
    for n, row in enumerate(x.double().tolist()):
        for code in codes.double().tolist():
            found = torch.tensor(sum((a - b) ** 2 for a, b in zip(row, code, strict=True))).float()
            result[n] = torch.fmin(result[n], found)
    return result


def lower(backend, distances, x, codes):
    result = distances.clone()
    with fastvq.use_backend(backend):
        assert ops.min_distance_(result, x, codes) is None
    return result


def tolerance(backend, x):
    """Return the relative tolerance: kernels round once, but add in different orders."""
    return 2.0**-23 if backend != "torch" or x.dtype == torch.float64 else (x.shape[1] + 3) * 2.0**-24


def assert_near(found, expected, relative):
    torch.testing.assert_close(found, expected, rtol=relative, atol=1e-37, equal_nan=True)


def vectors(n, m, d, dtype, seed=0):
    g = generator(seed)
    x, codes = (3 * torch.randn(rows, d, generator=g) for rows in (n, m))
    return 9 * d * torch.rand(n, generator=g), x.to(dtype), codes.to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 2, 3), (63, 1, 33), (26, 5, 8), (9, 1, 131), (0, 1, 3)], ids=str)
def test_is_the_definition(shape, backend):
    for dtype in DTYPES:
        distances, x, codes = vectors(*shape, dtype)
        expected = by_definition(distances, x, codes)
        assert_near(lower("reference", distances, x, codes), expected, 2.0**-23)
        assert_near(lower(backend, distances, x, codes), expected, tolerance(backend, x))


@given(n=st.integers(0, 60), m=st.integers(1, 4), d=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_shape(n, m, d, seed):
    distances, x, codes = vectors(n, m, d, torch.float32, seed)
    expected = lower("reference", distances, x, codes)
    for backend in cases.BACKENDS:
        assert_near(lower(backend, distances, x, codes), expected, tolerance(backend, x))


def check_sums():
    """Return a check of the native sums: they differ in order, hence in the last bit at most."""
    g, prepared = generator(1), []
    for d in (1, 7, 16, 33, 64, 100):
        for dtype in DTYPES:
            arguments = (
                torch.full((50,), torch.inf),
                torch.randn(50, d, generator=g).to(dtype),
                torch.randn(2, d, generator=g),
            )
            prepared.append((f"D={d}, {dtype}", arguments, lower("reference", *arguments)))

    def check():
        found = ((name, lower("native", *arguments), expected) for name, arguments, expected in prepared)
        return [name for name, one, other in found if not torch.allclose(one, other, rtol=2.0**-23, atol=0)]

    return check


@pytest.fixture(scope="module")
def by_instruction_set():
    return Outcomes("tests.ops.test_min_distance:check_sums", [(isa, "") for isa in TIERS])


@pytest.mark.parametrize("isa", TIERS)
def test_every_instruction_set(by_instruction_set, isa):
    by_instruction_set.assert_right(isa)


def test_a_row_that_is_a_code_has_distance_zero(backend):
    for dtype in DTYPES:
        distances, x, _ = vectors(40, 1, 19, dtype)
        found = lower(backend, distances, x, x[5:7])
        assert found[5:7].tolist() == [0, 0]


def test_zeros_are_a_mask(backend):
    """A row with distance zero may hold anything."""
    distances, x, codes = vectors(30, 2, 5, torch.float32)
    expected = by_definition(distances, x, codes)
    x[::3], distances[::3], expected[::3] = torch.nan, 0.0, 0.0
    assert_near(lower(backend, distances, x, codes), expected, tolerance(backend, x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_change_nothing(bad, backend):
    distances, x, codes = vectors(30, 3, 5, torch.float32)
    expected = by_definition(distances, x, codes[[0, 2]])
    codes[1, 2] = bad
    x[4, 1], expected[4] = bad, distances[4]
    assert_near(lower(backend, distances, x, codes), expected, tolerance(backend, x))
    assert bool(lower(backend, torch.full((4,), torch.nan), x[:4], codes[:1]).isfinite().all())


def test_threads_change_no_bit(backend):
    distances, x, codes = vectors(20000, 1, 33, torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(lower(backend, distances, x, codes))
    assert torch.equal(*found)


def test_layouts(backend):
    distances, x, codes = vectors(50, 2, 6, torch.float32)
    expected = lower(backend, distances, x, codes)
    for _, other in cases.layouts(x):
        assert_near(lower(backend, distances, other, codes), expected, tolerance(backend, x))
    strided = torch.stack([distances, distances], 1)[:, 1]
    with fastvq.use_backend(backend):
        ops.min_distance_(strided, x, codes)
    assert_near(strided, expected, tolerance(backend, x))


def test_rows_in_several_chunks(monkeypatch):
    distances, x, codes = vectors(100, 2, 9, torch.float32)
    expected = by_definition(distances, x, codes)
    monkeypatch.setattr("fastvq.backends.arithmetic.CHUNK_ELEMENTS", 40)
    monkeypatch.setattr("fastvq.backends.torch.search.tile_elements", lambda device: 40)
    for name in ("reference", "torch"):
        assert_near(lower(name, distances, x, codes), expected, tolerance(name, x))


def test_one_pass_equals_one_pass_for_each_code(backend):
    distances, x, codes = vectors(200, 4, 12, torch.float32)
    expected = distances
    for code in codes:
        expected = lower(backend, expected, x, code[None])
    assert torch.equal(lower(backend, distances, x, codes), expected)


def test_nothing_is_differentiated(backend):
    distances, x, codes = vectors(5, 1, 3, torch.float32)
    assert not lower(backend, distances, x.requires_grad_(), codes).requires_grad


def test_denormals_and_large_numbers(backend):
    x = torch.tensor([[1e-22, 0.0], [1e18, 1e18], [1e20, 0.0]])
    distances = torch.full((3,), torch.inf)
    expected = by_definition(distances, x, torch.zeros(1, 2))
    found = lower(backend, distances, x, torch.zeros(1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-45)
    assert reference.min_distance_(distances, x, torch.zeros(1, 2)) is None


def test_distances_that_share_memory_are_refused(backend):
    with fastvq.use_backend(backend), pytest.raises(ValueError, match=r"^distances: must have a place of its own"):
        fastvq.min_distance_(torch.full((1,), 9.0).expand(6), torch.randn(6, 2), torch.randn(1, 2))
