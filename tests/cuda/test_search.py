"""search and residual_search of csrc/cuda, in the emulator: every index is the specification's."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from fastvq.backends import reference

from ..cases import ADVERSARIAL, COPIES, DTYPES, FLOAT64_ONLY, METRICS, first_copies, generator
from . import emulation
from .emulation import ORDERS, run

# One group of codes and less; several tiles, with a rest; columns that fill what is packed, and that don't. On matrix
# units rows of up to 32 columns stay in registers (16 in three products), others in shared memory; 192 are streamed.
SHAPES = {
    "few": [(5, 9, 3), (7, 75, 33), (13, 130, 8)],
    "cores": [(5, 9, 3), (7, 75, 16), (13, 130, 8), (6, 300, 2)],
    "matrix": [(5, 9, 3), (7, 75, 33), (13, 130, 64), (9, 140, 16), (6, 70, 20), (3, 70, 130)],
    "three_products": [(5, 9, 3), (7, 75, 33), (9, 70, 16), (3, 20, 130)],
    "define": [(5, 9, 3), (7, 75, 33)],
}
SMALL_MEMORY = 68 << 10
"""Bytes of shared memory in which neither scan keeps rows of 192 columns."""


@functools.cache
def cases(path):
    """All data in all shapes. The metrics take turns, so that each meets all data and all shapes."""
    given = []
    for (number, (name, data)), (place, shape) in itertools.product(
        enumerate(ADVERSARIAL.items()), enumerate(SHAPES[path])
    ):
        metric = METRICS[(number + place) % 2]
        x, codebook = data(*shape, generator())
        given.append((f"{name} {shape} {metric}", x, codebook, metric, reference.search(x, codebook, metric=metric)))
    return given


# What is run in all orders of the threads.
SOME = (
    "gaussian",
    "duplicate_codes",
    "rounded_midpoints",
    "offset",
    "far_codes",
    "non_finite_vectors",
    "non_finite_codes",
)


def wrong(path, given, **options):
    """Return the names of the cases in which an index differs from the specification's."""
    calls = [emulation.search(x, codebook, metric, path) for _, x, codebook, metric, _ in given]
    answers = run(calls, shared=SMALL_MEMORY, **options)
    return [case[0] for case, (found, *_) in zip(given, answers, strict=True) if not torch.equal(found, case[-1])]


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_adversarial_data(order, path):
    given = [case for case in cases(path) if order == "forward" or case[0].partition(" ")[0] in SOME]
    assert not wrong(path, given, order=order, seed=11)


@pytest.mark.parametrize("path", SHAPES)
def test_with_products_fused_into_sums(path):
    """As nvcc may: bounds and indices hold all the same."""
    if "-mfma" not in emulation.machine_flags():
        pytest.skip("this processor has no fused multiply-add")
    assert not wrong(path, cases(path), by=emulation.program("fused"))


@pytest.mark.parametrize("unit", ["a100", "h100"])
def test_as_tensor_cores_compute(unit):
    """Sums that are cut off as on these GPUs: docs/gpu.md."""
    for path in ("matrix", "three_products"):
        given = [case for case in cases(path) if "(13, " not in case[0] and "(9, " not in case[0]]
        assert not wrong(path, given, unit=unit)


def test_dtypes():
    given = []
    for a, b, path in itertools.product(DTYPES, DTYPES, ("few", "cores", "matrix")):
        x, codebook = ADVERSARIAL["half_denormals" if a == b else "gaussian"](9, 40, 7, generator())
        x, codebook = x.to(a), codebook.to(b)
        given.append((path, x, codebook, reference.search(x, codebook)))
    for data in FLOAT64_ONLY.values():
        x, codebook = data(6, 20, 5, generator())
        given.append(("cores", x, codebook, reference.search(x, codebook)))
    answers = run(emulation.search(x, codebook, path=path) for path, x, codebook, _ in given)
    for (path, x, codebook, expected), (found, *_) in zip(given, answers, strict=True):
        assert torch.equal(found, expected), (path, x.dtype, codebook.dtype)


@pytest.mark.parametrize("processors", [1, 40])
def test_shapes_heads_and_splits(processors):
    """With 40 processors the codes are shared out among blocks. Rows beyond a block, and beyond what few rows are."""
    given = []
    for (n, k, d), name in itertools.product(
        [(1, 1, 1), (65, 400, 6), (600, 40, 12), (130, 70, 40), (70, 500, 24), (3, 20, 700), (66, 9, 520), (0, 5, 3)],
        ("gaussian", "duplicate_codes", "non_finite_vectors"),
    ):
        x, codebook = ADVERSARIAL[name](n, k, d, generator()) if n else (torch.empty(0, d), torch.randn(k, d))
        given.append((x, codebook))
    for n, k, d in [(3, 7, 5), (70, 33, 5), (70, 33, 20)]:
        pairs = [ADVERSARIAL[name](n, k, d, generator()) for name in ("gaussian", "offset", "far_codes")]
        given.append(tuple(torch.stack(t) for t in zip(*pairs, strict=True)))
    answers = run((emulation.search(*pair) for pair in given), processors=processors, order="shuffled")
    for (x, codebook), (found, *_) in zip(given, answers, strict=True):
        assert torch.equal(found, reference.search(x, codebook)), (x.shape, codebook.shape)


@pytest.mark.parametrize("path", ["cores", "matrix", "three_products"])
def test_rows_that_overflow_about_the_center(path):
    """They are finite, and what a scan says of them isn't."""
    given = []
    for dim in (4, 8, 20, 40, 130):
        if path == "cores" and dim > 16:
            continue
        codes = -2.5e38 + 2e37 * torch.randn(100, dim, generator=generator())
        x = 2.5e38 * (1 - 2 * torch.randint(0, 2, (70, dim), generator=generator(1)))
        given.append((str(dim), x, codes, "l2", reference.search(x, codes)))
    assert not wrong(path, given)


@pytest.mark.parametrize("path", ["matrix", "three_products"])
def test_streamed_rows_of_several_heads_and_blocks(path):
    pairs = [ADVERSARIAL[name](140, 150, 130, generator()) for name in ("gaussian", "vectors_far_from_codes")]
    x, codes = (torch.stack(t) for t in zip(*pairs, strict=True))
    assert not wrong(path, [("heads", x, codes, "l2", reference.search(x, codes))])


def test_heads_that_leave_different_rows_to_the_definition():
    names = ("rounded_midpoints", "gaussian", "duplicate_codes", "exact_midpoints")
    for dim in (3, 20):
        pairs = [ADVERSARIAL[name](80, 60, dim, generator()) for name in names]
        x, codes = (torch.stack(t) for t in zip(*pairs, strict=True))
        assert not wrong("cores" if dim == 3 else "matrix", [("heads", x, codes, "l2", reference.search(x, codes))])


def test_what_parts_of_codes_leave_is_in_the_bound():
    """Two codes that one float16 part of each makes equal, in different groups."""
    codes = torch.full((64, 16), -8.0)
    codes[0], codes[16] = 0.0, 0.0
    codes[0, 0], codes[16, 0] = 2 + 0.98 * 2.0**-10, 2.0**-10
    x = torch.zeros(70, 16)
    x[:, 0] = 1 + 2.0**-10
    assert not wrong("matrix", [("close", x, codes, "l2", reference.search(x, codes))])


def uncertified_shares(data, shape, path, shared=99 << 10):
    x, codebook = ADVERSARIAL[data](*shape, generator())
    ((found, counts),) = run([emulation.search(x, codebook, path=path)], shared=shared)
    assert torch.equal(found, reference.search(x, codebook))
    return [int(count) / len(x) for count in counts]


@pytest.mark.parametrize(
    ("data", "path", "dim", "first", "second"),
    [
        ("clustered", "cores", 8, 0.0, None),
        ("gaussian", "cores", 8, 0.002, None),
        ("offset", "cores", 8, 0.02, None),
        ("clustered", "matrix", 8, 0.01, 0.0),
        ("gaussian", "matrix", 8, 0.06, 0.002),
        ("clustered", "matrix", 32, 0.01, 0.0),
        ("gaussian", "matrix", 32, 0.06, 0.002),
        ("gaussian", "matrix", 64, 0.06, 0.004),
        ("gaussian", "matrix", 130, 0.09, 0.01),
    ],
)
def test_the_scans_certify_most_rows(data, path, dim, first, second):
    shape = (1024, 512, dim) if dim <= 32 else (300, 256, dim)
    shares = uncertified_shares(data, shape, path, SMALL_MEMORY)
    print(f"{data} {shape}: uncertified after the first scan {shares[0]:.2%}, by the second {max(shares[1], 0):.2%}")
    assert 0 <= shares[0] <= first
    if second is not None:
        assert 0 <= shares[1] <= second


@pytest.mark.parametrize(("path", "dim"), [("cores", 3), ("matrix", 20), ("matrix", 130), ("three_products", 33)])
def test_copies_cost_no_certificate(path, dim):
    """No more rows stay uncertified than among the distinct codes, and those are few."""
    for number, (name, data) in enumerate(COPIES.items()):
        metric = METRICS[number % 2]
        heads = [data(24, 200, dim, generator(seed)) for seed in range(2)]
        x, codebook = (torch.stack(t) for t in zip(*heads, strict=True))
        alone = [emulation.search(rows, first_copies(codes), metric, path) for rows, codes in heads]
        (found, counts), *fewest = run([emulation.search(x, codebook, metric, path), *alone])
        assert torch.equal(found, reference.search(x, codebook, metric=metric)), (name, metric)
        if name == "copies_but_for_one_bit":  # too close for a scan, unless they are few and so of one group
            continue
        fewest = torch.stack([each for _, each in fewest])
        assert torch.equal(counts.clamp_min(0), fewest.clamp_min(0).sum(0)), (name, metric, counts, fewest)
        assert counts.max() == 0, (name, metric, counts)


@pytest.mark.parametrize("dim", [3, 6, 33, 130])
def test_copies_beside_each_other_and_few_rows(dim):
    """Nothing is packed, and of a run of equal codes all but the first are left out."""
    distinct = torch.randn(3, dim, generator=generator())
    x = distinct.repeat(3, 1)
    runs_of = [torch.zeros(90, dim), distinct.repeat_interleave(30, 0), torch.cat([distinct, torch.zeros(87, dim)])]
    answers = run(emulation.search(x, codes, path="few") for codes in runs_of)
    for codes, (found, slices), runs in zip(runs_of, answers, (1, 3, 4), strict=True):
        assert torch.equal(found, reference.search(x, codes))
        assert slices[0] <= runs * len(x)
    given = [data(9, 90, dim, generator()) for data in COPIES.values()]
    answers = run(emulation.search(*case, path="few") for case in given)
    for case, (found, _) in zip(given, answers, strict=True):
        assert torch.equal(found, reference.search(*case))


def test_where_one_product_says_too_little():
    """Why vectors of up to 4 dimensions are scanned in float32 (CORES_DIM in search.cuh)."""
    shares = {dim: uncertified_shares("gaussian", (64, 16384, dim), "matrix")[0] for dim in (4, 5, 16)}
    found = ", ".join(f"{share:.0%} at D={dim}" for dim, share in shares.items())
    print(f"uncertified after one product at K=16384: {found}")
    assert shares[4] > 0.3
    assert max(shares[5], shares[16]) < 0.25


def stacks():
    g = generator()
    for n, q, k, d in [(1, 3, 40, 8), (9, 4, 33, 5), (21, 2, 100, 64), (140, 3, 20, 9), (130, 2, 30, 33), (0, 2, 3, 2)]:
        codebooks = torch.randn(q, k, d, generator=g) * 0.5 ** torch.arange(q)[:, None, None]
        yield torch.randn(n, d, generator=g), codebooks
    x, codebooks = torch.randn(7, 6, generator=g), torch.randn(3, 11, 6, generator=g)
    x[2, 1] = torch.nan
    codebooks[1, :, 2] = torch.inf
    codebooks[2, 5] = codebooks[2, 3]
    yield x, codebooks
    yield x.half(), codebooks.bfloat16()
    yield x.double(), codebooks[:, :4]
    yield x, codebooks.double()
    for n in (5, 140):
        yield torch.randn(n, 6, generator=g), torch.stack([torch.zeros(40, 6), codebooks[0, :1].repeat(40, 1)])


def test_a_path_that_cannot_be():
    x, codebook = ADVERSARIAL["gaussian"](70, 9, 17, generator())
    with pytest.raises(emulation.Failed, match="FASTVQ_CUDA_PATH=core: unknown; may be automatic, few, cores, matrix"):
        run([emulation.search(x, codebook, path="core")])
    with pytest.raises(emulation.Failed, match="FASTVQ_CUDA_PATH=cores: can't take 70 rows of 17 dimensions"):
        run([emulation.search(x, codebook, path="cores")])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("processors", [1, 5])
def test_residual_search(processors, order):
    given = list(stacks())
    answers = run((emulation.residual_search(*case) for case in given), order=order, seed=2, processors=processors)
    for (x, codebooks), (found, *_) in zip(given, answers, strict=True):
        assert torch.equal(found, reference.residual_search(x, codebooks)), (x.shape, codebooks.shape)
