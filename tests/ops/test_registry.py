"""The ops as torch sees them: schemas, fakes, tracing; and what they refuse."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.backends import reference
from fastvq.backends.torch import search

from .. import cases
from ..cases import generator
from ..op_samples import sample_inputs

SAMPLES = [pytest.param(*sample, id=f"{sample[0]}-{i}") for i, sample in enumerate(sample_inputs())]


def copies(arguments):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def by_reference(name, arguments, options):
    options = dict(options)
    mask = options.pop("mask", None) if "search" in name else None
    result = getattr(reference, name)(*arguments, **options)
    if mask is not None:
        result[~mask] = -1
    return result


@pytest.mark.parametrize(("name", "arguments", "options"), SAMPLES)
def test_samples_equal_the_reference(name, arguments, options, backend):
    expected_arguments, actual_arguments = copies(arguments), copies(arguments)
    expected = by_reference(name, expected_arguments, options)
    with fastvq.use_backend(backend):
        actual = getattr(fastvq.ops, name)(*actual_arguments, **options)
    if "quantize" in name or "assign" in name:
        cases.close(actual, expected)
    elif expected is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for a, b in zip(actual_arguments, expected_arguments, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "arguments", "options"), SAMPLES)
def test_opcheck(name, arguments, options, backend):
    with fastvq.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.fastvq, name).default, tuple(copies(arguments)), options)


def test_schemas():
    schemas = {name: str(getattr(torch.ops.fastvq, name).default._schema) for name in ("search", "ema_update_")}
    assert (
        schemas["search"]
        == 'fastvq::search(Tensor x, Tensor codebook, *, str metric="l2", Tensor? mask=None) -> Tensor'
    )
    assert (
        "Tensor(a0!) codebook, Tensor(a1!) cluster_size, Tensor(a2!) embed_avg, Tensor counts" in schemas["ema_update_"]
    )


def test_search_keeps_no_graph(backend, monkeypatch):
    """A graph would keep every temporary tensor until the last chunk is done."""
    recorded = []
    rows = search._search_rows
    monkeypatch.setattr(search, "_search_rows", lambda *a: (recorded.append(torch.is_grad_enabled()), rows(*a)))
    x = torch.randn(9, 4, requires_grad=True)
    with fastvq.use_backend(backend):
        assert not fastvq.search(x, x).requires_grad
    assert not any(recorded)


def make(layer_options, training=True):
    torch.manual_seed(0)
    return fastvq.VectorQuantize(8, 32, **layer_options).train(training)


def steps(layer, step, count=3):
    """`count` training steps on seeded batches: results as the backward leaves them, gradients, and the state."""
    results = []
    for i in range(count):
        x = torch.randn(6, 10, 8, generator=generator(i)).requires_grad_()
        torch.manual_seed(i)
        quantized, indices, loss = step(x)
        if layer.training:
            (quantized.square().mean() + loss).backward()
        results.append((quantized.detach(), indices, loss.detach(), x.grad))
    return results, layer.state_dict()


LAYERS = [
    {},
    {"use_cosine_sim": True, "codebook_dim": 4},
    {"kmeans_init": True, "threshold_ema_dead_code": 2, "rotation_trick": False},
    {"learnable_codebook": True},
    {"freeze_codebook": True},
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_compiles_without_a_graph_break(options, training):
    torch._dynamo.reset()
    if not training:
        options = options | {"kmeans_init": False}
    eager, compiled = make(options, training), make(options, training)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(steps(compiled, step), steps(eager, eager), rtol=1e-5, atol=1e-6)


def test_compiles_with_inductor():
    torch._dynamo.reset()
    eager, compiled = make({}), make({})
    step = torch.compile(compiled, fullgraph=True)
    torch.testing.assert_close(steps(compiled, step, 2), steps(eager, eager, 2), rtol=1e-4, atol=1e-5)


def test_compiles_for_any_batch():
    torch._dynamo.reset()
    layer = make({})
    step = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5, 8):
        assert step(torch.randn(batch, 10, 8))[1].shape == (batch, 10)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 4}, {"use_cosine_sim": True}, {"accept_image_fmap": True}], ids=str
)
def test_exports_in_eval(options, dynamic):
    layer = make(options, training=False)
    x = torch.randn(3, 8, 4, 5) if "accept_image_fmap" in options else torch.randn(3, 20, 8)
    shapes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    other = torch.cat([x, x])[:5] if dynamic else -x
    torch.testing.assert_close(program.module()(other), layer(other))
    assert "fastvq.search" in program.graph_module.code


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
    """On the meta device the fake refuses the same."""
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


STATE = {
    "codebook": torch.zeros(5, 4),
    "cluster_size": torch.zeros(5),
    "embed_avg": torch.zeros(5, 4),
    "counts": torch.zeros(5),
    "sums": torch.zeros(5, 4),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *[({name: t.half()}, TypeError, f"{name}: must be float32 .* got torch.float16") for name, t in STATE.items()],
        *[({name: t[:-1]}, ValueError, f"{name}: must have shape") for name, t in STATE.items() if name != "codebook"],
        *[
            ({n: t.to("meta")}, ValueError, f"{n}: must be on the device of codebook")
            for n, t in STATE.items()
            if n != "codebook"
        ],
        ({"codebook": torch.zeros(5)}, ValueError, r"codebook: must have shape \(K, D\), got \(5,\)"),
        ({"decay": 1.5}, ValueError, r"decay: must lie in \[0, 1\], got 1.5"),
        ({"decay": -0.1}, ValueError, "decay: must lie in"),
        ({"eps": -1e-5}, ValueError, "eps: must not be negative"),
        ({"eps": float("nan")}, ValueError, "eps: must not be negative"),
    ],
)
def test_ema_update_refuses_by_name(change, error, message):
    with pytest.raises(error, match=message):
        fastvq.ema_update_(**{**STATE, "decay": 0.8, "eps": 1e-5, **change})


def test_functions_are_documented():
    for name in ("search", "residual_search", "accumulate", "ema_update_", "min_distance_"):
        function = getattr(fastvq, name)
        assert function.__name__ == name
        assert "Raises:" in function.__doc__


def test_autograd_hears_of_what_is_written(backend):
    """Kernels write through plain pointers; a gradient that needs what was there is an error everywhere."""
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
