"""The op `quantize`, against scalar loops and the specification."""

from __future__ import annotations

import math

import pytest
import torch

import fastvq
from fastvq import ops
from fastvq.backends import reference
from fastvq.backends.arithmetic import compute_dtype

from ..cases import BACKENDS, DTYPES, SHAPES, close, generator

CODE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def operands(n, k, d, dtype, code_dtype=torch.float32):
    g = generator()
    codebook = torch.randn(k, d, generator=g).to(code_dtype)
    indices = torch.randint(-1, k, (n,), generator=g)
    x = (codebook[indices].float() + 0.3 * torch.randn(n, d, generator=g)).to(dtype)
    return x, codebook, indices


def forward_by_definition(x, codebook, indices):
    """Return the codes as lists and the error of the docstring of `quantize_forward`, scalar by scalar."""
    codes, squares = [], []
    for row, k in zip(x.double().tolist(), indices.tolist(), strict=True):
        code = codebook[k].double().tolist() if k >= 0 else [0.0] * len(row)
        codes.append(code)
        if k >= 0:
            squares += [(a - b) ** 2 for a, b in zip(row, code, strict=True)]
    return codes, math.fsum(squares) / max(1, len(squares))


def dot(a, b):
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def rotated_by_definition(grad, row, code):
    """Return lambda R^T grad for one row: entry i is the product of column i of the matrix R with grad."""
    length, code_length = math.sqrt(dot(row, row)), math.sqrt(dot(code, code))
    if min(length, code_length) < 1e-6:
        return grad
    u, v = [a / length for a in row], [b / code_length for b in code]
    w = [a + b for a, b in zip(u, v, strict=True)]
    w_length = max(math.sqrt(dot(w, w)), 1e-6)
    w = [a / w_length for a in w]
    columns = [[(i == j) - 2 * w[j] * w[i] + 2 * v[j] * u[i] for j in range(len(u))] for i in range(len(u))]
    return [code_length / length * dot(column, grad) for column in columns]


def backward_by_definition(x, codes, indices, quantized_grad, loss_grad, *, gradient, commitment_weight):
    """Apply the docstring of `quantize_backward`, scalar by scalar."""
    elements = max(1, x.shape[1] * sum(k >= 0 for k in indices.tolist()))
    pull = 2 * commitment_weight * loss_grad.item() / elements
    x_grad = []
    rows = (t.double().tolist() for t in (x, codes, quantized_grad))
    for row, code, grad, k in zip(*rows, indices.tolist(), strict=True):
        if k < 0:
            x_grad.append([0.0] * len(row))
            continue
        own = rotated_by_definition(grad, row, code) if gradient == "rotation" else grad
        x_grad.append([g + pull * (a - b) for g, a, b in zip(own, row, code, strict=True)])
    return torch.tensor(x_grad, dtype=torch.float64).reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_definition(dtype, name):
    for shape in [*SHAPES[:3], (0, 3, 5)]:
        x, codebook, indices = operands(*shape, dtype)
        codes, error = forward_by_definition(x, codebook, indices)
        with fastvq.use_backend(name):
            quantized, kept, actual = ops.quantize_forward(x, codebook, indices, True)
        expected = torch.tensor(codes, dtype=torch.float64).reshape(x.shape)
        assert torch.equal(quantized, expected.to(dtype))
        assert torch.equal(kept, expected.to(kept.dtype))
        close(actual, torch.tensor(error, dtype=actual.dtype))


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_the_definition(dtype, name, gradient):
    for weight in (0.0, 0.25):
        for shape in SHAPES[:3]:
            x, codebook, indices = operands(*shape, dtype)
            codes = torch.tensor(forward_by_definition(x, codebook, indices)[0], dtype=compute_dtype(x, codebook))
            grad = torch.randn(x.shape, generator=generator()).to(dtype)
            arguments = (x, codes, indices, grad, torch.full((), 0.7, dtype=codes.dtype))
            options = {"gradient": gradient, "commitment_weight": weight}
            with fastvq.use_backend(name):
                close(ops.quantize_backward(*arguments, **options), backward_by_definition(*arguments, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_equals_the_reference(dtype, backend):
    for code_dtype in CODE_DTYPES:
        for shape in [*SHAPES, (0, 3, 5)]:
            x, codebook, indices = operands(*shape, dtype, code_dtype)
            expected = reference.quantize_forward(x, codebook, indices, True)
            with fastvq.use_backend(backend):
                quantized, codes, error = ops.quantize_forward(x, codebook, indices, True)
                _, nothing, same = ops.quantize_forward(x, codebook, indices, False)
            assert torch.equal(quantized, expected[0])  # rounding to half precision included
            assert torch.equal(codes, expected[1])
            close(error, expected[2])
            assert nothing.shape == (0, shape[2])
            assert torch.equal(same, error)
            assert quantized.data_ptr() != codes.data_ptr() or not len(x)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_the_reference(dtype, gradient, backend):
    for weight in (0.0, 0.25):
        for shape in SHAPES:
            x, codebook, indices = operands(*shape, dtype, torch.float32)
            _, codes, _ = reference.quantize_forward(x, codebook, indices, True)
            grad = torch.randn(x.shape, generator=generator()).to(dtype)
            arguments = (x, codes, indices, grad, torch.full((), 0.7, dtype=codes.dtype))
            options = {"gradient": gradient, "commitment_weight": weight}
            with fastvq.use_backend(backend):
                actual = ops.quantize_backward(*arguments, **options)
            close(actual, reference.quantize_backward(*arguments, **options))
            assert not actual[indices < 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_as_torch_rounds(dtype, backend):
    """The values include ties, subnormals, the largest finite number and larger ones."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), generator=generator()).int()
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    halves = halves[halves.isfinite()].float()
    midpoints = (halves[1:] + halves[:-1]) / 2
    values = torch.cat([bits.view(torch.float32), halves, midpoints, torch.tensor([65504.0, 65519.9, 65520.0, 1e30])])
    codebook = values[values.isfinite()][:, None].contiguous()
    x = torch.zeros(len(codebook), 1, dtype=dtype)
    with fastvq.use_backend(backend):
        quantized, _, _ = ops.quantize_forward(x, codebook, torch.arange(len(codebook)), False)
    assert torch.equal(quantized, codebook.to(dtype))


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_threads_change_nothing(gradient, backend):
    x, codebook, indices = operands(5000, 40, 24, torch.float32)
    results, threads = [], torch.get_num_threads()
    options = {"gradient": gradient, "commitment_weight": 1.0}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with fastvq.use_backend(backend):
                quantized, codes, error = ops.quantize_forward(x, codebook, indices, True)
                grad = ops.quantize_backward(x, codes, indices, quantized, error, **options)
            results.append((quantized, codes, error, grad))
    finally:
        torch.set_num_threads(threads)
    if backend == "native":  # torch's own sums depend on the threads
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    else:
        close(results[0], results[1])


def test_excluded_rows_are_never_read(backend):
    x, codebook, indices = operands(50, 7, 5, torch.float32)
    clean = x.masked_fill((indices < 0)[:, None], 0)
    dirty = x.masked_fill((indices < 0)[:, None], torch.nan)
    with fastvq.use_backend(backend):
        for a, b in zip(*(ops.quantize_forward(t, codebook, indices, True) for t in (clean, dirty)), strict=True):
            assert torch.equal(a, b)
        options = {"gradient": "rotation", "commitment_weight": 1.0}
        _, codes, error = ops.quantize_forward(dirty, codebook, indices, True)
        assert ops.quantize_backward(dirty, codes, indices, dirty, error, **options).isfinite().all()


def test_opposite_and_short_vectors_have_a_gradient(backend):
    """The rotation turns opposite vectors by half a circle and leaves zero vectors alone."""
    codebook = torch.eye(3)
    x = torch.stack([-codebook[0], -codebook[1] + 1e-4, torch.zeros(3), codebook[2]])
    indices, grad = torch.tensor([0, 1, 2, 2]), torch.randn(4, 3, generator=generator())
    options = {"gradient": "rotation", "commitment_weight": 0.0}
    arguments = (x, codebook[indices], indices, grad, torch.zeros(()))
    with fastvq.use_backend(backend):
        actual = ops.quantize_backward(*arguments, **options)
    exact = reference.quantize_backward(*(t.double() if t.is_floating_point() else t for t in arguments), **options)
    # If x and its code nearly cancel, float32 keeps three digits of the direction between them.
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=5e-3)
    assert torch.equal(actual[2], grad[2])


@pytest.mark.parametrize("index", [-2, 7])
def test_an_index_out_of_range_is_refused(index, backend):
    x, codebook, indices = operands(50, 7, 5, torch.float32)
    indices[31] = index
    with (
        fastvq.use_backend(backend),
        pytest.raises((IndexError, RuntimeError), match=r"indices: must lie in \[-1, 7\)"),
    ):
        ops.quantize_forward(x, codebook, indices, True)


X, CODES, INDICES = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
GRADS = (torch.zeros(3, 4), torch.zeros(()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], CODES, INDICES, True), ValueError, r"x: must have shape \(N, D\)"),
        ((X, CODES[:, :2], INDICES, True), ValueError, "codebook: must have the dimension of x"),
        ((X, CODES[:0], INDICES, True), ValueError, "codebook: must hold at least one code"),
        ((X, CODES, INDICES.int(), True), TypeError, "indices: must be int64"),
        ((X, CODES, INDICES[:2], True), ValueError, "indices: must have shape"),
    ],
)
def test_forward_refuses_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.quantize_forward(*arguments)


@pytest.mark.parametrize(
    ("arguments", "gradient", "error", "message"),
    [
        ((X, X[:2], INDICES, *GRADS), "ste", ValueError, "codes: must have the shape of x"),
        ((X, X.half(), INDICES, *GRADS), "ste", TypeError, "codes: must be torch.float32 or torch.float64"),
        ((X, X, INDICES, X.half(), GRADS[1]), "ste", TypeError, "quantized_grad: must be torch.float32"),
        ((X, X, INDICES, X, X[0]), "ste", ValueError, "loss_grad: must be one number"),
        ((X, X, INDICES, *GRADS), "gumbel", ValueError, "gradient: must be one of ste, rotation, got 'gumbel'"),
    ],
)
def test_backward_refuses_by_name(arguments, gradient, error, message):
    with pytest.raises(error, match=message):
        ops.quantize_backward(*arguments, gradient=gradient, commitment_weight=1.0)
