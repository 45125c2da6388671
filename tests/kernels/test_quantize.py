"""The quantize step and its gradient: values to the bit, sums within rounding, and what must not be read isn't."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.backends.arithmetic import compute_dtype
from fastvq.kernels import quantize as kernels
from fastvq.kernels.residual_quantize import residual_quantize_backward, residual_quantize_forward

from ..cases import DTYPES, close, generator
from .test_accumulate import guard

# Of D: one column, an odd number, two blocks of columns, and more than a row that is taken whole.
SHAPES = [(1, 1, 1), (17, 31, 3), (70, 100, 33), (9, 7, 300), (3, 4, 1100)]
GRADIENTS = ("ste", "rotation")
WEIGHTS = (0.0, 0.1)


@pytest.fixture
def poison(monkeypatch):
    yield from guard(monkeypatch)


def on(device, *arguments):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]


def operands(n, k, d, stages=1, dtype=torch.float32, code_dtype=torch.float32):
    """Rows of which some have a NaN and no code at any stage, codebooks, and indices."""
    g = generator()
    scale = torch.tensor([0.5**q for q in range(stages)])[:, None, None]
    codebooks = (scale * torch.randn(stages, k, d, generator=g)).to(code_dtype)
    indices = torch.randint(-1, k, (n, stages), generator=g)
    x = codebooks[0][indices[:, 0]].float() + 0.3 * torch.randn(n, d, generator=g)
    if n > 1:
        indices[::7] = -1
        x[::7, ::2] = torch.nan
    return x.to(dtype), codebooks, indices


def check_forward(x, codebooks, indices, device):
    expected = reference.residual_quantize_forward(x, codebooks, indices, True)
    arguments = on(device, x, codebooks, indices)
    quantized, errors, residuals = (t.cpu() for t in residual_quantize_forward(*arguments, True))
    again, same, nothing = residual_quantize_forward(*arguments, False)
    assert torch.equal(quantized, expected[0])
    close(errors, expected[1])
    assert torch.equal(residuals.nan_to_num(77.0), expected[2].nan_to_num(77.0))
    assert nothing.shape == (0, *x.shape)
    assert torch.equal(again.cpu(), quantized)
    assert torch.equal(same.cpu(), errors)

    expected = reference.quantize_forward(x, codebooks[0], indices[:, 0], True)
    arguments = on(device, x, codebooks[0], indices[:, 0])
    quantized, codes, error = (t.cpu() for t in kernels.quantize_forward(*arguments, True))
    _, nothing, same = kernels.quantize_forward(*arguments, False)
    assert torch.equal(quantized, expected[0])
    assert torch.equal(codes, expected[1])
    close(error, expected[2])
    assert nothing.shape == (0, x.shape[1])
    assert torch.equal(same.cpu(), error)


def check_backward(x, codebooks, indices, device, gradient, weight):
    dtype = compute_dtype(x, codebooks)
    grad = torch.randn(x.shape, generator=generator(1)).to(x.dtype)
    grad[(indices < 0).all(1)] = torch.nan
    options = {"gradient": gradient, "commitment_weight": weight}

    pulls = torch.tensor([0.7, -1.0, 2.0], dtype=dtype)[: len(codebooks)]
    arguments = (x, codebooks, indices, grad, pulls)
    actual = residual_quantize_backward(*on(device, *arguments), **options).cpu()
    close(actual, reference.residual_quantize_backward(*arguments, **options))
    assert not actual[(indices < 0).all(1)].any()

    _, codes, _ = reference.quantize_forward(x, codebooks[0], indices[:, 0], True)
    arguments = (x, codes, indices[:, 0], grad, pulls[0])
    actual = kernels.quantize_backward(*on(device, *arguments), **options).cpu()
    close(actual, reference.quantize_backward(*arguments, **options))
    assert not actual[indices[:, 0] < 0].any()


@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_dtypes(dtype, code_dtype, device, poison):
    """Test all pairs of dtypes; each of rows and of codes meets all shapes, which take turns."""
    turn = DTYPES.index(dtype) + DTYPES.index(code_dtype)
    check_forward(*operands(*SHAPES[turn % 3], 2, dtype, code_dtype), device)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 5)], ids=str)
def test_forward_sizes(shape, device, poison):
    for stages in (1, 3):
        check_forward(*operands(*shape, stages), device)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_dtypes(dtype, gradient, weight, device, poison):
    """Test both dtypes of codes with each dtype of rows, gradient and weight: they take turns."""
    turn = DTYPES.index(dtype) + GRADIENTS.index(gradient) + WEIGHTS.index(weight)
    code_dtype = (torch.float32, torch.float64)[turn % 2]
    check_backward(*operands(37, 20, 33, 3, dtype, code_dtype), device, gradient, weight)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 5)], ids=str)
def test_backward_sizes(shape, gradient, device, poison):
    for stages in (1, 3):
        check_backward(*operands(*shape, stages), device, gradient, 0.1)


def test_rows_without_a_code_alone(device, poison):
    x, codebooks, indices = operands(20, 6, 5, 2)
    indices[:] = -1
    x[:] = torch.nan
    check_forward(x, codebooks, indices, device)
    for gradient in GRADIENTS:
        check_backward(x, codebooks, indices, device, gradient, 0.1)


def test_more_programs_than_the_mean_adds_at_once(device, monkeypatch, poison):
    monkeypatch.setattr(kernels, "TILE", 4)
    monkeypatch.setattr(kernels, "BLOCK_PARTIALS", 8)
    check_forward(*operands(33, 6, 5, 2), device)


@pytest.mark.parametrize("tile", [1, kernels.TILE])
def test_errors_are_summed_in_float64(tile, device, monkeypatch):
    """In float32 some of the ones would vanish beside 2^24, within a program and over programs."""
    monkeypatch.setattr(kernels, "TILE", tile)
    x = torch.tensor([2.0**12, *[1.0] * 60])[:, None].to(device)
    error = kernels.quantize_forward(x, torch.zeros(1, 1).to(device), torch.zeros(61).long().to(device), False)[2]
    assert error.item() == torch.tensor((2.0**24 + 60) / 61).item()


def test_layouts(device):
    """Rows, codes, indices and gradients that don't lie side by side."""
    x, codebooks, indices = operands(20, 6, 5, 2)
    arguments = (x, codebooks, indices, torch.randn(20, 5, generator=generator()), torch.tensor([1.0, 2.0]))
    other = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in arguments[:4]]
    other.append(torch.stack([arguments[4]] * 2, 1)[:, 1])
    assert not any(t.is_contiguous() for t in other)
    options = {"gradient": "rotation", "commitment_weight": 0.3}
    for a, b in zip(
        residual_quantize_forward(*on(device, *arguments[:3]), True),
        residual_quantize_forward(*on(device, *other[:3]), True),
        strict=True,
    ):
        assert torch.equal(a.nan_to_num(77.0), b.nan_to_num(77.0))
    first, second = (residual_quantize_backward(*on(device, *a), **options) for a in (arguments, other))
    assert torch.equal(first, second)
    # A gradient of a mean has stride 0.
    x, codes, index, grad = x, codebooks[0][indices[:, 0]], indices[:, 0], torch.ones(1, 1).expand(20, 5)
    actual = kernels.quantize_backward(*on(device, x, codes, index, grad, torch.ones(())), **options).cpu()
    close(actual, reference.quantize_backward(x, codes, index, grad, torch.ones(()), **options))


def test_the_same_at_every_run(device):
    x, codebooks, indices = on(device, *operands(200, 40, 24, 3))
    options = {"gradient": "rotation", "commitment_weight": 1.0}
    runs = []
    for _ in range(2):
        quantized, errors, residuals = residual_quantize_forward(x, codebooks, indices, True)
        grad = residual_quantize_backward(x, codebooks, indices, quantized, errors, **options)
        runs.append([t.nan_to_num(77.0) for t in (quantized, errors, residuals, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dim", [3, 1100])
def test_opposite_and_short_vectors_have_a_gradient(dim, device):
    """An x opposite to its code is rotated by half a circle; a zero vector is not rotated."""
    codebook = torch.eye(3, dim)
    x = torch.stack([-codebook[0], -codebook[1] + 1e-4 * codebook[2], torch.zeros(dim), codebook[2], codebook[0]])
    codes = codebook[[0, 1, 2, 2, 0]]
    codes[4] = 0
    grad = torch.randn(5, dim, generator=generator())
    options = {"gradient": "rotation", "commitment_weight": 0.0}
    arguments = (x, codes, torch.zeros(5, dtype=torch.int64), grad, torch.zeros(()))
    actual = kernels.quantize_backward(*on(device, *arguments), **options).cpu()
    exact = reference.quantize_backward(*(t.double() if t.is_floating_point() else t for t in arguments), **options)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-5)
    assert torch.equal(actual[2], grad[2])
    assert torch.equal(actual[4], grad[4])


def test_opposite_rows_of_one_element_cancel(device):
    """The sum of opposite directions is a rounding error, by whose square nothing may be divided."""
    codes = torch.randn(60, 1, generator=generator())
    x = -codes * (0.5 + torch.rand(60, 1, generator=generator(1)))
    arguments = (x, codes, torch.zeros(60, dtype=torch.int64), torch.ones(60, 1), torch.zeros(()))
    actual = kernels.quantize_backward(*on(device, *arguments), gradient="rotation", commitment_weight=0.0)
    close(actual.cpu(), -(codes / x).abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code_dtype", [torch.float32, torch.float64], ids=str)
def test_half_precision_is_rounded_as_torch_rounds(dtype, code_dtype, device):
    """Ties, subnormals, the largest finite number and what lies beyond it; float64 by way of float32."""
    halves = torch.arange(-(2**15), 2**15, 37, dtype=torch.int32).to(torch.int16).view(dtype)
    halves = halves[halves.isfinite()].double()
    following = torch.nextafter(halves.to(dtype), torch.full_like(halves, torch.inf).to(dtype)).double()
    midpoints = (halves + following) / 2
    values = torch.cat([halves, midpoints, midpoints * (1 + 2.0**-40), midpoints * (1 - 2.0**-40)])
    values = torch.cat([values, torch.tensor([65504.0, 65519.9, 65520.0, 1e30, 3.39e38])]).to(code_dtype)
    values = values[values.isfinite()]
    # 64 columns to a code: the interpreter takes its time for each program.
    codebook = values[: len(values) // 64 * 64].view(-1, 64)
    x = torch.zeros(codebook.shape, dtype=dtype)
    arguments = on(device, x, codebook, torch.arange(len(codebook)))
    quantized, _, _ = kernels.quantize_forward(*arguments, False)
    assert torch.equal(quantized.cpu(), codebook.to(dtype))


@pytest.mark.parametrize("index", [-2, 7, 2**40])
def test_an_index_out_of_range_is_named(index, device, monkeypatch, poison):
    """On the CPU. Where the device asserts it gets no code: the interpreter goes on without one."""
    if device.type != "cpu":
        pytest.skip("the device asserts")
    x, codebooks, indices = operands(50, 7, 5)
    skipped = indices.clone()
    skipped[31], indices[31] = -1, index
    with pytest.raises(IndexError, match=rf"indices: must lie in \[-1, 7\), got {index}"):
        kernels.quantize_forward(x, codebooks[0], indices[:, 0], True)
    with pytest.raises(IndexError, match=rf"indices: must lie in \[-1, 7\), got {index}"):
        residual_quantize_forward(x, codebooks, indices, True)
    expected = kernels.quantize_forward(x, codebooks[0], skipped[:, 0], True)
    monkeypatch.setattr(kernels, "check_index_range", lambda *_: None)
    for a, b in zip(kernels.quantize_forward(x, codebooks[0], indices[:, 0], True), expected, strict=True):
        assert torch.equal(a, b)
