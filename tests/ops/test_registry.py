"""Schemas, fakes and versions of the registered ops, and the errors of their argument checks."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fastvq
from fastvq.backends import native, reference
from fastvq.backends.support import GRADIENTS, METRICS, SOFT_METRICS, call_dtype
from fastvq.backends.torch import search

from .. import cases
from ..op_samples import sample_inputs

MASKED_AFTERWARDS = {"search", "topk_search", "residual_search"}
"""Ops that take a mask, which their definitions do not: a masked row of the result is -1."""
ROUNDED = {
    "quantize_forward",
    "quantize_backward",
    "residual_quantize_forward",
    "residual_quantize_backward",
    "soft_assign_forward",
    "soft_assign_backward",
    "binary_assign_forward",
    "binary_assign_backward",
}
"""Ops whose results are compared within the tolerance of their dtype; those of the others are equal bit for bit."""
SOFT = {"soft_assign_forward", "soft_assign_backward"}
"""Ops whose metric is one of SOFT_METRICS."""

SAMPLES = [pytest.param(*sample, id=f"{sample[0]}-{i}") for i, sample in enumerate(sample_inputs())]


def dtype_of(arguments):
    return call_dtype(*(a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()))


def copies(arguments):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def by_reference(name, arguments, options):
    options = dict(options)
    mask = options.pop("mask", None) if name in MASKED_AFTERWARDS else None
    result = getattr(reference, name)(*arguments, **options)
    if mask is not None:
        result[~mask] = -1
    return result


@pytest.mark.parametrize(("name", "arguments", "options"), SAMPLES)
def test_samples_equal_the_reference(name, arguments, options, backend):
    cases.require_support(backend, name, dtype_of(arguments))
    expected_arguments, actual_arguments = copies(arguments), copies(arguments)
    expected = by_reference(name, expected_arguments, options)
    with fastvq.use_backend(backend):
        actual = getattr(fastvq.ops, name)(*actual_arguments, **options)
    if name in ROUNDED:
        cases.close(actual, expected)
    elif expected is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for a, b in zip(actual_arguments, expected_arguments, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "arguments", "options"), SAMPLES)
def test_opcheck(name, arguments, options, backend):
    cases.require_support(backend, name, dtype_of(arguments))
    numbers = {"metric": SOFT_METRICS if name in SOFT else METRICS, "gradient": GRADIENTS}
    options = {key: numbers[key][value] if key in numbers else value for key, value in options.items()}
    with fastvq.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.fastvq, name).default, tuple(copies(arguments)), options)


@pytest.mark.parametrize(("name", "arguments", "options"), SAMPLES)
def test_results_require_no_gradient(name, arguments, options, backend):
    """No op has a gradient of its own: a result that required one would fail in the backward pass."""
    cases.require_support(backend, name, dtype_of(arguments))
    written = {"ema_update_": 3, "min_distance_": 1}.get(name, 0)
    given = copies(arguments)
    for tensor in given[written:]:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    with fastvq.use_backend(backend):
        found = getattr(fastvq.ops, name)(*given, **options)
    for tensor in found if isinstance(found, tuple) else (found,) if found is not None else given[:written]:
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


def test_schemas():
    schemas = {name: str(getattr(torch.ops.fastvq, name).default._schema) for name in ("search", "ema_update_")}
    assert (
        schemas["search"]
        == "fastvq::search(Tensor x, Tensor codebook, *, SymInt metric=0, Tensor? mask=None) -> Tensor"
    )
    assert (
        "Tensor(a0!) codebook, Tensor(a1!) cluster_size, Tensor(a2!) embed_avg, Tensor counts" in schemas["ema_update_"]
    )


def test_search_keeps_no_graph(backend, monkeypatch):
    """A graph would keep every temporary tensor until the end of the last chunk."""
    recorded = []
    rows = search._search_rows
    monkeypatch.setattr(search, "_search_rows", lambda *a: (recorded.append(torch.is_grad_enabled()), rows(*a)))
    x = torch.randn(9, 4, requires_grad=True)
    with fastvq.use_backend(backend):
        assert not fastvq.search(x, x).requires_grad
    assert not any(recorded)


X, CODES = torch.zeros(3, 4), torch.zeros(5, 4)
META = torch.zeros(5, 4, device="meta")
INDICES = torch.zeros(3, dtype=torch.int64)
STAGES = torch.zeros(2, 5, 4)
FAR = torch.ones(3)


@pytest.mark.parametrize(
    ("name", "arguments", "options", "error", "message"),
    [
        ("search", (X, CODES[:0]), {}, ValueError, r"codebook: must hold at least one code, got shape \(0, 4\)"),
        (
            "search",
            (X, CODES[:, :3]),
            {},
            ValueError,
            r"codebook: must have the dimension of x, D=4, got shape \(5, 3\)",
        ),
        ("search", (X[:, :0], CODES[:, :0]), {}, ValueError, "x: must have at least one dimension D"),
        ("search", (X[0], CODES), {}, ValueError, r"x: must have shape \(N, D\) or \(H, N, D\), got \(4,\)"),
        ("search", (X, CODES[0]), {}, ValueError, r"codebook: must have shape \(K, D\), got \(4,\)"),
        ("search", (X[None], CODES), {}, ValueError, r"codebook: must have shape \(H, K, D\) beside x"),
        (
            "search",
            (X.expand(2, 3, 4), CODES.expand(3, 5, 4)),
            {},
            ValueError,
            "codebook: must have the heads of x, H=2",
        ),
        ("search", (X.long(), CODES), {}, TypeError, "x: must be float32, .* got torch.int64"),
        ("search", (X, CODES.bool()), {}, TypeError, "codebook: must be float32, .* got torch.bool"),
        ("search", (X.cfloat(), CODES), {}, TypeError, "x: must be float32, .* got torch.complex64"),
        ("search", (X, META), {}, ValueError, "codebook: must be on the device of x, cpu, got meta"),
        ("search", (X, CODES), {"metric": "cosine"}, ValueError, "metric: must be 'l2' or 'dot', got 'cosine'"),
        ("residual_search", (X, STAGES[:0]), {}, ValueError, "codebooks: must hold at least one stage"),
        ("residual_search", (X, STAGES[:, :0]), {}, ValueError, "codebooks: must hold at least one code"),
        ("residual_search", (X, CODES), {}, ValueError, r"codebooks: must have shape \(Q, K, D\)"),
        ("residual_search", (X, STAGES[..., :2]), {}, ValueError, "codebooks: must have the dimension of x"),
        ("residual_search", (X[None], STAGES), {}, ValueError, r"x: must have shape \(N, D\)"),
        ("accumulate", (X, INDICES.int(), 5), {}, TypeError, "indices: must be int64, got torch.int32"),
        (
            "accumulate",
            (X, INDICES[:2], 5),
            {},
            ValueError,
            r"indices: must have shape \(N,\) = \(3,\) beside x, got \(2,\)",
        ),
        ("accumulate", (X, INDICES.to("meta"), 5), {}, ValueError, "indices: must be on the device of x"),
        ("accumulate", (X, INDICES, 0), {}, ValueError, "codebook_size: must be at least 1, got 0"),
        ("accumulate", (X.int(), INDICES, 5), {}, TypeError, "x: must be float32"),
        ("accumulate", (X[None], INDICES, 5), {}, ValueError, r"x: must have shape \(N, D\)"),
        ("min_distance_", (FAR, X[None], CODES), {}, ValueError, r"x: must have shape \(N, D\), got \(1, 3, 4\)"),
        ("min_distance_", (FAR, X.int(), CODES), {}, TypeError, "x: must be float32"),
        ("min_distance_", (FAR, X, CODES[0]), {}, ValueError, r"codes: must have shape \(M, D\), got \(4,\)"),
        ("min_distance_", (FAR, X, CODES[:0]), {}, ValueError, "codes: must hold at least one code"),
        ("min_distance_", (FAR, X, CODES[:, :3]), {}, ValueError, "codes: must have the dimension of x, D=4"),
        (
            "min_distance_",
            (FAR[:2], X, CODES),
            {},
            ValueError,
            r"distances: must be torch.float32 of shape \(3,\), got",
        ),
        ("min_distance_", (FAR.double(), X, CODES), {}, ValueError, "distances: must be torch.float32 of shape"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_by_name(name, arguments, options, error, message, device):
    """The fake refuses the same arguments on the meta device."""
    if device == "meta":
        if "device" in message:
            arguments, message = (
                [a.to("meta") if a.device.type == "cpu" else a.new_zeros(a.shape, device="cpu") for a in arguments[:2]]
                + [*arguments[2:]],
                message.replace("x, cpu, got meta", "x, meta, got cpu"),
            )
        else:
            arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(error, match=message):
        getattr(fastvq, name)(*arguments, **options)


def test_functions_are_documented():
    for name in ("search", "residual_search", "accumulate", "ema_update_", "min_distance_"):
        function = getattr(fastvq, name)
        assert function.__name__ == name
        assert "Raises:" in function.__doc__


def test_writes_bump_the_versions(backend):
    """Kernels write through plain pointers; a gradient that needs the old values must fail on every backend."""
    x, codes = torch.randn(5, 3), torch.randn(4, 3)
    distances, weights = torch.full((5,), 9.0), torch.ones(5, requires_grad=True)
    product = (weights * distances).sum()
    state = [torch.randn(4, 3), torch.rand(4), torch.randn(4, 3)]
    before = [t._version for t in state]
    with fastvq.use_backend(backend):
        fastvq.min_distance_(distances, x, codes)
        fastvq.ema_update_(*state, torch.ones(4), torch.randn(4, 3), decay=0.9, eps=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert all(t._version > version for t, version in zip(state, before, strict=True))
    with torch.inference_mode(), fastvq.use_backend(backend):
        fastvq.min_distance_(torch.ones(5), x, codes)


def test_written_tensors_may_require_a_gradient(backend):
    """Whatever their strides: the kernel's copy is written back without a graph."""
    x, codes = torch.randn(5, 3), torch.randn(4, 3)
    distances = torch.full((5, 2), 9.0, requires_grad=True)[:, 0]
    state = [torch.ones(3, 4).T.requires_grad_(), torch.ones(4, 2)[:, 0].requires_grad_(), torch.ones(3, 4).T]
    with fastvq.use_backend(backend):
        fastvq.min_distance_(distances, x, codes)
        fastvq.ema_update_(*state, torch.ones(4), torch.full((4, 3), 2.0), decay=0.0, eps=0.0)
    assert bool((distances < 9).all())
    assert torch.equal(state[0], torch.full((4, 3), 2.0))


def test_a_compiled_write_bumps_the_version():
    x, codes, distances = torch.randn(5, 3), torch.randn(4, 3), torch.full((5,), 9.0)
    before = distances._version
    torch.compile(fastvq.min_distance_, backend="aot_eager", fullgraph=True)(distances, x, codes)
    assert distances._version > before
    assert bool((distances < 9).all())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda x, c: fastvq.search(x.tolist(), c)),
        ("mask", lambda x, c: fastvq.search(x, c, mask=[True] * 10)),
        ("seed", lambda x, c: fastvq.sample(x, c, temperature=1.0, seed=1)),
        ("k", lambda x, c: fastvq.topk_search(x, c, "3")),
        ("codebook_size", lambda x, c: fastvq.accumulate(x, fastvq.search(x, c), "a")),
        ("gradient", lambda x, c: fastvq.quantize(x, c, gradient=["ste"])),
        ("metric", lambda x, c: fastvq.search(x, c, metric=["l2"])),
    ],
)
def test_an_argument_of_another_type_is_named(name, call):
    with pytest.raises((TypeError, ValueError), match=rf"'{name}'|^{name}:"):
        call(torch.randn(10, 4), torch.randn(8, 4))


def test_a_failed_op_holds_no_tensor():
    native.instruction_set()  # loads the library, behind which the choice in Python then stands
    x = torch.randn(1000, 4)
    held = weakref.ref(x)
    with fastvq.use_backend("torch"), pytest.raises((RuntimeError, ValueError)):
        torch.ops.fastvq.search(x, torch.randn(8, 3))
    del x
    gc.collect()
    assert held() is None
