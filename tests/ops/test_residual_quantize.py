"""The op `residual_quantize`, against scalar loops and the specification."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq import ops
from fastvq.backends import reference
from fastvq.backends.arithmetic import compute_dtype

from ..cases import BACKENDS, DTYPES, SHAPES, close, generator
from .test_quantize import CODE_DTYPES, backward_by_definition, forward_by_definition, operands


def stage_operands(n, k, d, stages, dtype, code_dtype=torch.float32):
    """Return rows, codebooks that get smaller, and indices with -1 at single stages and at all stages of a row."""
    g = generator()
    scale = torch.tensor([0.5**q for q in range(stages)])[:, None, None]
    codebooks = (scale * torch.randn(stages, k, d, generator=g)).to(code_dtype)
    indices = torch.randint(-1, k, (n, stages), generator=g)
    indices[::7] = -1
    return torch.randn(n, d, generator=g).to(dtype), codebooks, indices


def stages_by_definition(x, codebooks, indices, dtype):
    """Return (residuals, codes, errors), stage by stage: one rounded subtraction of scalars for each element."""
    residual, residuals, codes, errors = x.to(dtype), [], [], []
    for codebook, stage in zip(codebooks, indices.unbind(1), strict=True):
        chosen, error = forward_by_definition(residual, codebook, stage)
        chosen = torch.tensor(chosen, dtype=torch.float64).reshape(x.shape)
        residuals.append(residual)
        codes.append(chosen.to(dtype))
        errors.append(error)
        residual = (residual.double() - chosen).to(dtype)
    return torch.stack(residuals), torch.stack(codes), torch.tensor(errors, dtype=dtype)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_definition(dtype, name):
    for shape in [*SHAPES[:3], (0, 3, 5)]:
        x, codebooks, indices = stage_operands(*shape, 3, dtype)
        residuals, codes, errors = stages_by_definition(x, codebooks, indices, compute_dtype(x, codebooks))
        with fastvq.use_backend(name):
            quantized, actual, kept = ops.residual_quantize_forward(x, codebooks, indices, True)
        assert torch.equal(quantized, ((codes[0] + codes[1]) + codes[2]).to(dtype))
        assert torch.equal(kept, residuals)
        close(actual, errors)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backward_is_the_definition(dtype, name, gradient):
    for shape in SHAPES[:3]:
        x, codebooks, indices = stage_operands(*shape, 3, dtype)
        residuals, codes, _ = stages_by_definition(x, codebooks, indices, dtype)
        grad, error_grads = torch.randn(x.shape, generator=generator()).to(dtype), torch.tensor([0.7, -1.0, 2.0])
        options = {"gradient": gradient, "commitment_weight": 0.25}
        stages = zip(residuals, codes, indices.unbind(1), error_grads, strict=True)
        expected = sum(backward_by_definition(r, e, k, grad, g, **options) for r, e, k, g in stages)
        with fastvq.use_backend(name):
            arguments = (x, codebooks, indices, grad, error_grads.to(dtype))
            close(ops.residual_quantize_backward(*arguments, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_equals_the_reference(dtype, backend):
    for code_dtype in CODE_DTYPES:
        for shape in [*SHAPES, (0, 3, 5)]:
            for stages in (1, 3):
                arguments = stage_operands(*shape, stages, dtype, code_dtype)
                expected = reference.residual_quantize_forward(*arguments, True)
                with fastvq.use_backend(backend):
                    quantized, errors, residuals = ops.residual_quantize_forward(*arguments, True)
                    again, same, nothing = ops.residual_quantize_forward(*arguments, False)
                assert torch.equal(quantized, expected[0])
                close(errors, expected[1])
                assert torch.equal(residuals, expected[2])
                assert nothing.shape == (0, shape[0], shape[2])
                assert torch.equal(again, quantized)
                assert torch.equal(same, errors)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_the_reference(dtype, gradient, backend):
    for weight in (0.0, 0.25):
        for shape in SHAPES:
            x, codebooks, indices = stage_operands(*shape, 3, dtype)
            grad = torch.randn(x.shape, generator=generator()).to(dtype)
            error_grads = torch.tensor([0.7, -1.0, 2.0], dtype=compute_dtype(x, codebooks))
            arguments = (x, codebooks, indices, grad, error_grads)
            options = {"gradient": gradient, "commitment_weight": weight}
            with fastvq.use_backend(backend):
                actual = ops.residual_quantize_backward(*arguments, **options)
            close(actual, reference.residual_quantize_backward(*arguments, **options))
            assert not actual[(indices < 0).all(1)].any()


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_threads_change_nothing(gradient, backend):
    x, codebooks, indices = stage_operands(5000, 40, 24, 3, torch.float32)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with fastvq.use_backend(backend):
                forward = ops.residual_quantize_forward(x, codebooks, indices, True)
                arguments = (x, codebooks, indices, forward[0], forward[1])
                grad = ops.residual_quantize_backward(*arguments, gradient=gradient, commitment_weight=1.0)
            results.append((*forward, grad))
    finally:
        torch.set_num_threads(threads)
    if backend == "native":  # torch's own sums depend on the threads
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    else:
        close(results[0], results[1])


@pytest.mark.parametrize("index", [-2, 7])
def test_an_index_out_of_range_is_refused(index, backend):
    x, codebooks, indices = stage_operands(50, 7, 5, 2, torch.float32)
    indices[31, 1] = index
    with (
        fastvq.use_backend(backend),
        pytest.raises((IndexError, RuntimeError), match=r"indices: must lie in \[-1, 7\)"),
    ):
        ops.residual_quantize_forward(x, codebooks, indices, True)


def test_one_stage_equals_quantize(backend):
    x, codebook, indices = operands(50, 7, 5, torch.float32)
    grad = torch.randn(x.shape, generator=generator())
    with fastvq.use_backend(backend):
        quantized, codes, error = ops.quantize_forward(x, codebook, indices, True)
        staged = ops.residual_quantize_forward(x, codebook[None], indices[:, None], True)
        options = {"gradient": "rotation", "commitment_weight": 0.25}
        x_grad = ops.quantize_backward(x, codes, indices, grad, torch.ones(()), **options)
        residual_grad = ops.residual_quantize_backward(
            x, codebook[None], indices[:, None], grad, torch.ones(1), **options
        )
    assert torch.equal(staged[0], quantized)
    close(staged[1][0], error)
    assert torch.equal(staged[2][0], x)
    close(residual_grad, x_grad)


X, CODES, INDICES = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
STAGES, STAGE_INDICES, ONES = torch.zeros(2, 5, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x: must have shape \(N, D\)"),
        ({"codebooks": CODES}, ValueError, r"codebooks: must have shape \(Q, K, D\)"),
        ({"indices": INDICES}, ValueError, r"indices: must have shape \(N, Q\) = \(3, 2\) beside x and codebooks"),
        ({"indices": STAGE_INDICES.int()}, TypeError, "indices: must be int64"),
        ({"quantized_grad": X.half()}, TypeError, "quantized_grad: must be torch.float32"),
        ({"error_grads": torch.ones(3)}, ValueError, r"error_grads: must be \(2,\) of torch.float32"),
        ({"error_grads": ONES.double()}, ValueError, r"error_grads: must be \(2,\) of torch.float32"),
        ({"gradient": "gumbel"}, ValueError, "gradient: must be one of ste, rotation, got 'gumbel'"),
    ],
)
def test_names_the_argument_that_is_refused(change, error, message):
    given = {"x": X, "codebooks": STAGES, "indices": STAGE_INDICES, "quantized_grad": X, "error_grads": ONES}
    given |= {"gradient": "ste", "commitment_weight": 1.0}
    with pytest.raises(error, match=message):
        ops.residual_quantize_backward(**given | change)
    if change.keys() <= {"x", "codebooks", "indices"}:
        forward = {name: given[name] for name in ("x", "codebooks", "indices")}
        with pytest.raises(error, match=message):
            ops.residual_quantize_forward(**forward | change, keep_residuals=True)
