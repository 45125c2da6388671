"""Shared parts of tests: dtypes, shapes, tolerances, and data made to break a nearest-code search."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastvq
from fastvq.backends import reference, select

BACKENDS = ("native", "torch")
METRICS = ("l2", "dot")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALF = (torch.float16, torch.bfloat16)

# N, K, D: all ones, odd sizes around vector widths and tiles, and as long as a test may take.
SHAPES = [(1, 1, 1), (17, 31, 3), (63, 100, 33), (26, 257, 8)]
LARGE_SHAPES = [(257, 1000, 96), (41, 5000, 2), (30, 70, 513), (200, 1, 16), (0, 5, 3)]

# Where a result may depend on the order of operations, as indices never may. `atol` is relative to the largest value of
# the tensor, and absolute where that is below one: an element that cancels keeps the errors of its terms.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
}
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}
"""For gradients in float32, which sum over a batch."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flags_as_numbers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of vector_quantize_pytorch with its bool flags as float32, which they are in fastvq.

    They can be averaged then.
    """
    return {name: value.float() if value.dtype == torch.bool else value for name, value in state.items()}


def close(
    actual: Tensor | tuple,
    expected: Tensor | tuple,
    dtype: torch.dtype | None = None,
    tolerance: dict[str, float] | None = None,
    name: str = "",
) -> None:
    """Assert that indices are equal and that values agree within `tolerance`, by default that of their dtype."""
    if isinstance(actual, tuple):
        for one, other in zip(actual, expected, strict=True):
            close(one, other, dtype, tolerance, name)
        return
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    tolerance = tolerance or TOLERANCE[dtype or actual.dtype]
    finite = expected.detach()[expected.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance["rtol"],
        atol=tolerance["atol"] * scale,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}" if name else message,
    )


def require_support(backend: str, op: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip a test of an op that a backend lacks on the CPU; that it is refused is in tests/backends/test_support.py."""
    reason = select.BACKENDS[backend].why_not(op, torch.device("cpu"), dtype)
    if not select.BACKENDS[backend].support(op, torch.device("cpu"), dtype):
        pytest.skip(f"{backend}: {reason}")


def weighted_by_loop(state, statistics, weight: Tensor, decay: float, eps: float) -> list[Tensor]:
    """Codebook, cluster size and embed_avg after `ema_update_` with a weight, by a loop over scalars in float64."""
    codebook, cluster_size, embed_avg = (t.tolist() for t in state)
    counts, sums = (t.tolist() for t in statistics)
    shares = [(1 - decay) * w for w in weight.tolist()]
    for k, share in enumerate(shares):
        cluster_size[k] += share * (counts[k] - cluster_size[k])
        embed_avg[k] = [m + share * (s - m) for m, s in zip(embed_avg[k], sums[k], strict=True)]
    total = sum(cluster_size)
    for k, size in enumerate(cluster_size):
        smoothed = (size + eps) / (total + len(cluster_size) * eps) * total
        if smoothed > 0:
            codebook[k] = [m / smoothed for m in embed_avg[k]]
    return [torch.tensor(t) for t in (codebook, cluster_size, embed_avg)]


Data = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]
ADVERSARIAL: dict[str, Data] = {}
"""Each maps (N, K, D, generator) to x (N, D) and a codebook (K, D)."""


def adversarial(data: Data) -> Data:
    ADVERSARIAL[data.__name__] = data
    return data


def around(codes: Tensor, n: int, spread: float, g: torch.Generator) -> Tensor:
    """Vectors that each lie near one of the codes."""
    owner = torch.randint(len(codes), (n,), generator=g)
    return codes[owner] + spread * torch.randn(n, codes.shape[1], generator=g)


@adversarial
def gaussian(n, k, d, g):
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


@adversarial
def clustered(n, k, d, g):
    codes = torch.randn(k, d, generator=g)
    return around(codes, n, 0.1, g), codes


@adversarial
def codes_themselves(n, k, d, g):
    codes = torch.randn(k, d, generator=g)
    return around(codes, n, 0.0, g), codes


@adversarial
def duplicate_codes(n, k, d, g):
    distinct = torch.randn(max(1, k // 7), d, generator=g)
    codes = distinct[torch.randint(len(distinct), (k,), generator=g)]
    return around(codes, n, 0.5, g), codes


@adversarial
def all_codes_equal(n, k, d, g):
    return torch.randn(n, d, generator=g), torch.randn(1, d, generator=g).repeat(k, 1)


@adversarial
def signed_zeros(n, k, d, g):
    """Return codes that are equal as numbers and differ as bits, and copies of them."""
    codes = torch.zeros(k, d) * torch.where(torch.rand(k, d, generator=g) < 0.5, -1.0, 1.0)
    codes[::3] = codes[0].clone()
    return torch.randn(n, d, generator=g), codes


@adversarial
def codes_one_ulp_apart(n, k, d, g):
    codes = torch.randn(1, d, generator=g).repeat(k, 1)
    rows, column = torch.arange(k), torch.randint(d, (k,), generator=g)
    towards = torch.where(torch.rand(k, generator=g) < 0.5, -torch.inf, torch.inf)
    codes[rows, column] = torch.nextafter(codes[rows, column], towards)
    return around(codes, n, 1e-3, g), codes


@adversarial
def exact_midpoints(n, k, d, g):
    """Codes with few bits: the midpoint of two of them, and its distances to both, are exact and equal."""
    codes = torch.randint(-8, 9, (k, d), generator=g) / 4.0
    first, second = torch.randint(k, (2, n), generator=g)
    return (codes[first] + codes[second]) / 2, codes


@adversarial
def rounded_midpoints(n, k, d, g):
    codes = torch.randn(k, d, generator=g)
    first, second = torch.randint(k, (2, n), generator=g)
    return (codes[first] + codes[second]) / 2, codes


@adversarial
def lattice(n, k, d, g):
    """Ties everywhere."""
    return torch.randint(-1, 2, (n, d), generator=g).float(), torch.randint(-1, 2, (k, d), generator=g).float()


@adversarial
def opposite_codes(n, k, d, g):
    """For x = 0 each code ties with its opposite, in float64 too."""
    codes = torch.randn(k, d, generator=g)
    codes[k // 2 : k // 2 * 2] = -codes[: k // 2]
    return torch.randn(n, d, generator=g) * (torch.rand(n, 1, generator=g) < 0.5), codes


@adversarial
def equidistant_codes(n, k, d, g):
    """Codes on a sphere around every vector: distances differ in the last digits of float32, or beyond."""
    center = torch.randn(d, generator=g)
    directions = torch.nn.functional.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=1)
    codes = (center + 3 * directions).float()
    return center + 1e-6 * torch.randn(n, d, generator=g), codes


@adversarial
def offset(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x + 1e4, codes + 1e4


@adversarial
def offset_with_outlier(n, k, d, g):
    """Return data in which an outlier prevents centering from helping."""
    x, codes = offset(n, k, d, g)
    codes[-1] = -1e4
    return x, codes


@adversarial
def far_codes(n, k, d, g):
    """Return a few codes 9 to 1000 times as long as the others, and rows from the others out to them and beyond."""
    codes = torch.randn(k, d, generator=g)
    far = torch.randperm(k, generator=g)[: max(1, k // 64)]
    codes[far] *= 10 ** (0.95 + 2 * torch.rand(len(far), 1, generator=g))
    towards = codes[far[torch.randint(len(far), (n,), generator=g)]]
    fraction = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0, 1.5])[torch.randint(6, (n, 1), generator=g)]
    return towards * fraction + torch.randn(n, d, generator=g), codes


@adversarial
def vectors_far_from_codes(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x + 1e4, codes


@adversarial
def one_giant_code(n, k, d, g):
    """Scaled by the giant, all other codes are next to zero."""
    x, codes = gaussian(n, k, d, g)
    codes[0] *= 1e18
    return x, codes


@adversarial
def mixed_magnitudes(n, k, d, g):
    scale = 10.0 ** (12 * torch.rand(d, generator=g) - 6)
    x, codes = gaussian(n, k, d, g)
    return x * scale * 10 ** torch.randn(n, 1, generator=g), codes * scale * 10 ** torch.randn(k, 1, generator=g)


@adversarial
def values_of_1e_38(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x * 1e-38, codes * 1e-38


@adversarial
def denormals(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x * 2.0**-140, codes * 2.0**-140


@adversarial
def half_denormals(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x * 2.0**-20, codes * 2.0**-20


@adversarial
def values_of_1e18(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x * 1e18, codes * 1e18


@adversarial
def values_of_1e38(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x.clamp(-3, 3) * 1e38, codes.clamp(-3, 3) * 1e38


@adversarial
def huge_vectors_tiny_codes(n, k, d, g):
    """All distances of a row tie in float64."""
    x, codes = gaussian(n, k, d, g)
    return x * 1e18, codes * 1e-3


@adversarial
def large_vectors(n, k, d, g):
    """Most distances of a row tie in float64, though their products with the codes differ in float32."""
    x, codes = gaussian(n, k, d, g)
    return x * 1e15, codes


@adversarial
def largest_vectors(n, k, d, g):
    """Their products with the codes overflow float32, both ways."""
    x, codes = gaussian(n, k, d, g)
    return x.sign() * 3e38, codes


@adversarial
def opposite_extremes(n, k, d, g):
    """Return rows and codes whose difference overflows float32, though gradients and averages need not."""
    x, codes = gaussian(n, k, d, g)
    return x.abs().clamp(0.1, 3) * 1e38, -codes.abs().clamp(0.1, 3) * 1e38


@adversarial
def one_giant_row(n, k, d, g):
    """Beside it, all other rows are next to zero."""
    x, codes = gaussian(n, k, d, g)
    x[:1] *= 1e37
    return x, codes


@adversarial
def nearly_equal_norms(n, k, d, g):
    """Near the origin the norms of the codes decide as much as the products do, and both differ beyond float32."""
    x, codes = gaussian(n, k, d, g)
    return x * 1e-8, torch.nn.functional.normalize(codes.double(), dim=1).float()


@adversarial
def tiny_vectors_huge_codes(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    return x * 1e-18, codes * 1e18


@adversarial
def zeros(n, k, d, g):
    return torch.zeros(n, d), torch.zeros(k, d)


@adversarial
def non_finite_vectors(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[torch.rand(n, generator=g) < 0.2, torch.randint(d, (), generator=g)] = bad
    return x, codes


@adversarial
def non_finite_codes(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    for bad in (torch.nan, torch.inf, -torch.inf):
        codes[torch.rand(k, generator=g) < 0.3, torch.randint(d, (), generator=g)] = bad
    return x, codes


@adversarial
def only_non_finite_codes(n, k, d, g):
    x, codes = gaussian(n, k, d, g)
    codes[:, d // 2] = torch.tensor([torch.nan, torch.inf]).repeat(k)[:k]
    return x, codes


def zero_codes(n, k, d, g):
    return torch.randn(n, d, generator=g), torch.zeros(k, d)


def copies_in_random_order(n, k, d, g):
    distinct = torch.randn(5, d, generator=g)
    return around(distinct, n, 0.1, g), distinct[torch.randint(5, (k,), generator=g)]


def few_codes_among_zeros(n, k, d, g):
    codes = torch.zeros(k, d)
    codes[torch.randperm(k, generator=g)[:5]] = torch.randn(5, d, generator=g)[:k]
    return around(codes.unique(dim=0), n, 0.1, g), codes


def copies_of_a_far_code(n, k, d, g):
    """Return copies of a long code that would be too many to be left out of a scan, and rows near the others."""
    codes = torch.randn(k, d, generator=g)
    far, near = torch.randperm(k, generator=g).tensor_split([k // 8])
    codes[far] = 1e4
    return around(codes[near], n, 0.1, g), codes


def copies_of_non_finite_codes(n, k, d, g):
    x, codes = copies_in_random_order(n, k, d, g)
    codes[::4, 0], codes[1::4, d // 2] = torch.nan, torch.inf
    return x, codes


def copies_but_for_one_bit(n, k, d, g):
    """Return codes of which half differ from a copy in the last bit of an element, and the codes as rows."""
    codes = torch.randn(4, d, generator=g)[torch.randint(4, (k,), generator=g)]
    bits = codes.view(torch.int32)
    bits[torch.arange(0, k, 2), torch.randint(d, ((k + 1) // 2,), generator=g)] ^= 1
    return around(codes, n, 0.0, g), codes


COPIES: dict[str, Data] = {
    data.__name__: data
    for data in (
        zero_codes,
        copies_in_random_order,
        copies_of_a_far_code,
        few_codes_among_zeros,
        copies_but_for_one_bit,
        copies_of_non_finite_codes,
    )
}
"""As ADVERSARIAL, for the search of the kernels, which leaves out codes that equal an earlier one."""


def first_copies(codebook: Tensor) -> Tensor:
    """Return the codes without those that equal an earlier one as numbers."""
    seen: dict[tuple[float, ...], int] = {}
    for k, code in enumerate(codebook.tolist()):
        seen.setdefault(tuple(code), k)
    return codebook[list(seen.values())]


FLOAT64_ONLY: dict[str, Data] = {
    "float64_overflow": lambda n, k, d, g: tuple(t.double() * 1e200 for t in gaussian(n, k, d, g)),
    "float64_overflow_non_finite_codes": lambda n, k, d, g: tuple(
        t.double() * 1e200 for t in non_finite_codes(n, k, d, g)
    ),
    "float64_underflow": lambda n, k, d, g: tuple(t.double() * 1e-170 for t in gaussian(n, k, d, g)),
    "float64_denormals": lambda n, k, d, g: tuple(t.double() * 2.0**-1060 for t in gaussian(n, k, d, g)),
    "float64_giant_offset": lambda n, k, d, g: tuple(t.double() + 1e150 for t in gaussian(n, k, d, g)),
    "float64_one_ulp_apart": lambda n, k, d, g: tuple(1 + 2.0**-52 * t.double().round() for t in lattice(n, k, d, g)),
}


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Return the same matrix with other strides."""
    yield "transposed", t.T.contiguous().T
    yield "strided", torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
    yield "sliced", torch.cat([torch.full_like(t, torch.nan), t], 1)[:, t.shape[1] :]
    yield "offset", torch.cat([torch.zeros(1, dtype=t.dtype), t.flatten()])[1:].view(t.shape)


def mismatch(x: Tensor, codebook: Tensor, backend: str, metric: str = "l2", expected: Tensor | None = None) -> str:
    """Return the differences between the backend's indices and the specification's, empty if there are none."""
    if expected is None:
        expected = reference.search(x, codebook, metric=metric)
    with fastvq.use_backend(backend):
        actual = fastvq.search(x, codebook, metric=metric)
    if actual.dtype != torch.int64 or actual.shape != expected.shape:
        return f"{actual.dtype} {tuple(actual.shape)}, not int64 {tuple(expected.shape)}"
    wrong = actual != expected
    if not wrong.any():
        return ""
    where = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {wrong.numel()} indices, first at {where}: {actual[where]} for {expected[where]}"


def large_rows(n, d, dtype=torch.float32):
    """Return rows for sums that float32 arithmetic would round."""
    return (1e3 * torch.randn(n, d, generator=generator())).to(dtype)


def uniform(n, k):
    """Return indices of all codes, some of them -1; this and the next three are distributions of indices."""
    return torch.randint(-1, k, (n,), generator=generator(1))


def one_code(n, k):
    return torch.full((n,), k // 2)


def skipped(n, k):
    return torch.full((n,), -1)


def skewed(n, k):
    return (k * torch.rand(n, generator=generator(1)) ** 8).long().clamp_max(k - 1)
