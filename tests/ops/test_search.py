"""The op `search`: the specification against scalar loops, every backend against the specification."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

import fastvq
from fastvq.backends import native, reference, select
from fastvq.backends.torch.search import TILE_CODES

from .. import cases
from ..cases import ADVERSARIAL, DTYPES, FLOAT64_ONLY, METRICS, generator, mismatch
from ..instruction_sets import TIERS, Outcomes


def by_definition(x, codebook, metric):
    """Apply the docstring of `fastvq.search`, scalar by scalar: a Python float is an IEEE float64, never contracted."""
    indices = []
    for row in x.double().tolist():
        index, best = -1, math.inf
        for k, code in enumerate(codebook.double().tolist()):
            score = 0.0
            for a, b in zip(row, code, strict=True):
                score += (a - b) * (a - b) if metric == "l2" else -(a * b)
            score = math.inf if math.isnan(score) else score
            if all(map(math.isfinite, row + code)) and (index < 0 or score < best):
                index, best = k, score
        indices.append(index)
    return torch.tensor(indices, dtype=torch.int64)


@pytest.mark.parametrize("data", [*ADVERSARIAL, *FLOAT64_ONLY])
def test_reference_is_the_definition(data):
    for dtype in DTYPES:
        for metric in METRICS:
            for n, k, d in [(1, 1, 1), (9, 11, 3), (6, 5, 20)]:
                x, codebook = (t.to(dtype) for t in (ADVERSARIAL | FLOAT64_ONLY)[data](n, k, d, generator()))
                expected = by_definition(x, codebook, metric)
                assert torch.equal(reference.search(x, codebook, metric=metric), expected), (dtype, metric, n)


@pytest.mark.parametrize("data", ["gaussian", "clustered", "offset", "mixed_magnitudes", "denormals", "values_of_1e18"])
def test_reference_is_the_nearest_in_rational_arithmetic(data):
    for metric in METRICS:
        x, codebook = ADVERSARIAL[data](30, 12, 9, generator())
        codes = [[Fraction(e) for e in code] for code in codebook.tolist()]
        clear = 0
        for row, index in zip(x.tolist(), reference.search(x, codebook, metric=metric).tolist(), strict=True):
            exact = [Fraction(a) for a in row]
            pairs = [list(zip(exact, code, strict=True)) for code in codes]
            scores = [sum((a - b) ** 2 if metric == "l2" else -a * b for a, b in pair) for pair in pairs]
            sizes = [sum((abs(a) + abs(b)) ** 2 for a, b in pair) for pair in pairs]
            first, second = sorted(scores)[:2]
            if second - first > Fraction(1, 10**13) * max(sizes):
                clear += 1
                assert index == scores.index(first)
        assert clear >= 15


@pytest.mark.parametrize("data", ADVERSARIAL)
def test_equals_the_reference(data, backend):
    for dtype in DTYPES:
        for shape in cases.SHAPES:
            x, codebook = (t.to(dtype) for t in ADVERSARIAL[data](*shape, generator()))
            for metric in METRICS:
                assert not mismatch(x, codebook, backend, metric), f"{dtype}, {shape}, {metric}"


@pytest.mark.parametrize("data", FLOAT64_ONLY)
def test_float64_equals_the_reference(data, backend):
    for shape in cases.SHAPES:
        x, codebook = FLOAT64_ONLY[data](*shape, generator())
        for metric in METRICS:
            assert not mismatch(x, codebook, backend, metric), f"{shape}, {metric}"


@pytest.mark.parametrize("shape", cases.LARGE_SHAPES, ids=str)
def test_large_shapes(shape, backend):
    for data in ("gaussian", "clustered", "codes_one_ulp_apart", "exact_midpoints", "offset"):
        x, codebook = ADVERSARIAL[data](*shape, generator())
        assert not mismatch(x, codebook, backend), data


@pytest.mark.parametrize("data", ADVERSARIAL)
def test_few_rows(data, backend):
    """Their scores are products up to 32 rows, or distances where products do not tell the codes apart."""
    for n in (3, 4, 17, 32, 33):
        x, codebook = (t.float() for t in ADVERSARIAL[data](n, 300, 20, generator()))
        for metric in METRICS:
            assert not mismatch(x, codebook, backend, metric), f"{n}, {metric}"


@pytest.mark.skipif(not native.build_record()["built"], reason="no native library was built")
def test_more_rows_among_large_codebooks():
    """Here products of the native backend serve up to 80 rows, as packed codes would not stay in a cache."""
    x, codebook = (t.float() for t in ADVERSARIAL["exact_midpoints"](81, 2048, 256, generator()))
    expected = reference.search(x, codebook)
    for n in (33, 80, 81):
        assert not mismatch(x[:n], codebook, "native", expected=expected[:n]), n


def test_every_remainder_of_the_dimension(backend):
    for d in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 512, 513):
        for data in ("gaussian", "rounded_midpoints"):
            x, codebook = ADVERSARIAL[data](25, 45, d, generator(d))
            assert not mismatch(x, codebook, backend), f"D={d}, {data}"


def test_every_remainder_of_the_codebook_and_the_batch(backend):
    for k in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 500):
        for n in (*range(15), 191, 192, 193):
            x, codebook = ADVERSARIAL["rounded_midpoints"](n, k, 6, generator(n))
            assert not mismatch(x, codebook, backend), f"K={k}, N={n}"


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_mixed_dtypes(x_dtype, backend):
    for codebook_dtype in DTYPES:
        for data in (
            "gaussian",
            "rounded_midpoints",
            "offset",
            "half_denormals",
            "non_finite_codes",
            "non_finite_vectors",
        ):
            x, codebook = ADVERSARIAL[data](50, 70, 12, generator())
            assert not mismatch(x.to(x_dtype), codebook.to(codebook_dtype), backend), f"{codebook_dtype}, {data}"


@pytest.mark.parametrize("dtype", cases.HALF, ids=str)
def test_every_half_precision_value_is_read_exactly(dtype, backend):
    """Among all values of the dtype in float64, each is nearest to its equal."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    with fastvq.use_backend(backend):
        for part in values.split(512):
            finite = part[part.isfinite()].double()
            codebook = finite.unique()[:, None] if len(finite) else torch.zeros(1, 1)
            indices = fastvq.search(part[:, None], codebook)
            assert torch.equal(indices >= 0, part.isfinite())
            assert torch.equal(codebook[indices[indices >= 0], 0].double(), finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype, backend):
    x, codebook = (t.to(dtype) for t in ADVERSARIAL["rounded_midpoints"](40, 50, 11, generator()))
    expected = reference.search(x, codebook)
    for (name, other_x), (_, other_codebook) in zip(cases.layouts(x), cases.layouts(codebook), strict=True):
        assert not mismatch(other_x, codebook, backend, expected=expected), f"x {name}"
        assert not mismatch(x, other_codebook, backend, expected=expected), f"codebook {name}"
    assert not mismatch(x[:1].expand(9, 11), codebook[3:4].expand(20, 11), backend)


def test_heads(backend):
    x, codebook = ADVERSARIAL["rounded_midpoints"](3 * 20, 3 * 30, 7, generator())
    x, codebook = x.view(3, 20, 7), codebook.view(3, 30, 7)
    heads = torch.stack([reference.search(x[h], codebook[h]) for h in range(3)])
    assert not mismatch(x, codebook, backend, expected=heads)
    assert not mismatch(x.transpose(0, 1).contiguous().transpose(0, 1), codebook, backend, expected=heads)
    for shape in [(3, 0, 7), (0, 20, 7)]:
        with fastvq.use_backend(backend):
            assert fastvq.search(torch.zeros(shape), codebook[: shape[0]]).shape == shape[:2]
        assert reference.search(torch.zeros(shape), codebook[: shape[0]]).shape == shape[:2]


def test_ties_over_more_codes_than_a_tile(backend):
    """The torch backend gets more candidates than it can hold and takes fewer rows at once."""
    x, codebook = ADVERSARIAL["lattice"](40, 3 * TILE_CODES + 5, 3, generator())
    assert not mismatch(x, codebook, backend)


def test_non_finite_rows_beside_outliers(backend):
    """The offset puts the stand-in for a non-finite row as far from the codes as the outliers are."""
    x, codebook = (t + 300 for t in ADVERSARIAL["far_codes"](50, 200, 8, generator()))
    x[::3, 2] = math.nan
    assert not mismatch(x, codebook, backend)


def test_a_batch_may_be_split_anywhere(backend):
    x, codebook = ADVERSARIAL["rounded_midpoints"](100, 64, 24, generator())
    with fastvq.use_backend(backend):
        whole = fastvq.search(x, codebook)
        for size in (1, 7, 64):
            assert torch.equal(torch.cat([fastvq.search(part, codebook) for part in x.split(size)]), whole)


def test_threads(backend):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for data in ("clustered", "rounded_midpoints", "duplicate_codes"):
            x, codebook = ADVERSARIAL[data](600, 300, 48, generator())
            assert not mismatch(x, codebook, backend), data


def test_codes_in_several_tiles(monkeypatch):
    for tile in (1, 7, 64):
        monkeypatch.setattr("fastvq.backends.torch.search.TILE_CODES", tile)
        for data in (
            "gaussian",
            "duplicate_codes",
            "non_finite_codes",
            "only_non_finite_codes",
            "huge_vectors_tiny_codes",
        ):
            x, codebook = ADVERSARIAL[data](40, 150, 6, generator())
            assert not mismatch(x, codebook, "torch"), data


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision(precision, backend):
    torch.set_float32_matmul_precision(precision)
    for data in ("gaussian", "rounded_midpoints", "offset", "mixed_magnitudes", "equidistant_codes"):
        for metric in METRICS:
            x, codebook = ADVERSARIAL[data](300, 400, 64, generator())
            assert not mismatch(x, codebook, backend, metric), data


@pytest.mark.parametrize("dtype", cases.HALF, ids=str)
def test_autocast(dtype, backend):
    x, codebook = ADVERSARIAL["gaussian"](300, 400, 64, generator())
    expected = reference.search(x, codebook)
    with torch.autocast("cpu", dtype=dtype):
        assert not mismatch(x, codebook, backend, expected=expected)


@pytest.mark.parametrize(
    ("data", "dtype"),
    [("denormals", torch.float32), ("denormals", torch.bfloat16), ("half_denormals", torch.float16)],
)
def test_flushed_denormals(data, dtype, backend):
    """Indices stay exact under `torch.set_flush_denormal`, which makes the processor read denormals as zero."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)  # the data are made in IEEE arithmetic
        x, codebook = (t.to(dtype) for t in ADVERSARIAL[data](1100, 40, 33, generator()))
        expected = reference.search(x, codebook)
        assert torch.set_flush_denormal(True)
        assert not mismatch(x, codebook, backend, expected=expected)
        assert torch.equal(reference.search(x, codebook), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype(dtype, backend):
    x, codebook = ADVERSARIAL["rounded_midpoints"](50, 60, 20, generator())
    torch.set_default_dtype(dtype)
    assert not mismatch(x, codebook, backend)


def test_grad_modes(backend):
    x, codebook = ADVERSARIAL["rounded_midpoints"](50, 60, 20, generator())
    expected = reference.search(x, codebook)
    assert not mismatch(x.requires_grad_(), codebook.requires_grad_(), backend, expected=expected)
    with torch.inference_mode():
        assert not mismatch(x, codebook, backend, expected=expected)


def check_all_data():
    """Return a check of the native backend on the adversarial set, with the definition's answers."""
    prepared = []
    for (name, data), shape, metric in itertools.product(ADVERSARIAL.items(), cases.SHAPES, METRICS):
        x, codebook = data(*shape, generator())
        prepared.append((f"{name} {shape}", metric, x, codebook, reference.search(x, codebook, metric=metric)))

    def check():
        wrong = []
        for name, metric, x, codebook, expected in prepared:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                if found := mismatch(x, codebook, "native", metric, expected):
                    wrong.append(f"{name} {metric}, {threads} threads: {found}")
        return wrong

    return check


SETTINGS = [(isa, tier) for isa, tiers in TIERS.items() for tier in tiers]


@pytest.fixture(scope="module")
def by_setting():
    return Outcomes("tests.ops.test_search:check_all_data", SETTINGS)


@pytest.mark.parametrize(("isa", "tier"), SETTINGS)
def test_instruction_sets_and_tiers(by_setting, isa, tier):
    by_setting.assert_right(isa, tier)


FLOATS = {
    torch.float32: st.floats(width=32),
    torch.float16: st.floats(width=16),
    torch.float64: st.floats(),
}


@st.composite
def searches(draw, dtypes=tuple(FLOATS)):
    """Draw x and codes of arbitrary bits, with many repeated elements."""
    n, k, d = draw(st.integers(0, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    pool = None
    tensors = []
    for rows in (n, k):
        dtype = draw(st.sampled_from(dtypes))
        numpy_dtype = str(dtype).removeprefix("torch.")
        elements = FLOATS[dtype]
        if pool is not None and draw(st.booleans()):
            elements = st.sampled_from(pool) if pool else elements
        array = draw(np_st.arrays(numpy_dtype, (rows, d), elements=elements))
        pool = [float(v) for v in array.flatten() if dtype == torch.float16 or torch.float16 not in dtypes][:4]
        tensors.append(torch.from_numpy(array))
    return *tensors, draw(st.sampled_from(METRICS))


@given(searches())
def test_any_bits(search):
    x, codebook, metric = search
    expected = by_definition(x, codebook, metric)
    assert torch.equal(reference.search(x, codebook, metric=metric), expected)
    for backend in cases.BACKENDS:
        assert not mismatch(x, codebook, backend, metric, expected), backend


@given(
    data=st.sampled_from(sorted(ADVERSARIAL)),
    shape=st.tuples(st.integers(0, 60), st.integers(1, 300), st.integers(1, 80)),
    seed=st.integers(0, 2**31),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    metric=st.sampled_from(METRICS),
    scale=st.integers(-60, 60),
    shift=st.sampled_from([0.0, 0.0, 1.0, -1e4, 1e18]),
)
def test_any_shape_seed_and_scale(data, shape, seed, dtypes, metric, scale, shift):
    x, codebook = ADVERSARIAL[data](*shape, generator(seed))
    x, codebook = ((t * 2.0**scale + shift).to(dtype) for t, dtype in zip((x, codebook), dtypes, strict=True))
    expected = reference.search(x, codebook, metric=metric)
    for backend in cases.BACKENDS:
        assert not mismatch(x, codebook, backend, metric, expected), backend


SEARCHES = {
    "search": lambda x, codes, **options: fastvq.search(x, codes, **options),
    "topk_search": lambda x, codes, **options: fastvq.topk_search(x, codes, 3, **options),
    "residual_search": lambda x, codes, **options: fastvq.residual_search(x, codes.expand(2, -1, -1), **options),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_masked_rows_are_not_searched(name, backend, monkeypatch):
    """They get -1, and the backend sees only the other rows; the native library selects them itself, unseen here."""
    search, x, codes = SEARCHES[name], torch.randn(30, 4), torch.randn(9, 4)
    some = torch.rand(30, generator=generator()) < 0.5
    with fastvq.use_backend(backend):
        expected = search(x, codes)
        for mask in (some, torch.zeros_like(some), torch.ones_like(some)):
            counts = []
            implementation = select.select(name, x, codes)
            monkeypatch.setattr(
                select,
                "select",
                lambda op, *tensors, _run=implementation, _counts=counts: (
                    lambda x, *a, **o: (_counts.append(len(x)), _run(x, *a, **o))[1]
                ),
            )
            actual = search(x, codes, mask=mask)
            monkeypatch.undo()
            assert counts == ([] if backend == "native" else [int(mask.sum())])
            assert (actual[~mask] == -1).all()
            assert torch.equal(actual[mask], expected[mask])


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_without_a_nearest_code_get_the_index_that_is_asked_for(name, packed):
    x, codes = torch.randn(30, 4), torch.randn(9, 4)
    x[3, 1], x[5, 0] = torch.nan, torch.inf
    mask = torch.arange(30) != 7
    if name == "residual_search":
        codes = codes.expand(2, -1, -1).contiguous()
    arguments = (fastvq.PackedCodebook(codes) if packed else codes, *([3] if name == "topk_search" else []))
    search = getattr(fastvq, name)
    expected = search(x, *arguments, mask=mask)
    assert (expected[[3, 5, 7]] == -1).all()
    for missing in (-1, 0, 9):
        found = search(x, *arguments, mask=mask, missing=missing)
        assert torch.equal(found, expected.where(expected >= 0, missing))
    with pytest.raises(TypeError, match=r"missing: must be an integer, got 0\.5"):
        search(x, *arguments, missing=0.5)


@pytest.mark.parametrize("name", SEARCHES)
def test_refuses_an_invalid_mask(name):
    x, codes = torch.randn(30, 4), torch.randn(9, 4)
    with pytest.raises(TypeError, match="mask: must be bool, got torch"):
        SEARCHES[name](x, codes, mask=torch.ones(30))
    with pytest.raises(ValueError, match=r"mask: must have shape \(30,\) beside x, got \(29,\)"):
        SEARCHES[name](x, codes, mask=torch.ones(29, dtype=torch.bool))
