"""Outputs, losses and gradients of `residual_quantize`, against a stack of calls of `quantize`."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.backends.support import GRADIENTS
from fastvq.functional.quantize import lookup

from ..cases import close, generator


def inputs(n=40, k=12, d=7, stages=3, dtype=torch.float32):
    g = generator()
    scale = torch.tensor([0.6**q for q in range(stages)])[:, None, None]
    codebooks = scale * torch.randn(stages, k, d, generator=g)
    return torch.randn(n, d, generator=g).to(dtype).requires_grad_(), codebooks.to(dtype)


def stacked(x, codebooks, **options):
    """Apply the docstring: each stage quantizes the residual, its code held constant."""
    residual, total, stages, losses, residuals = x, torch.zeros_like(x), [], [], []
    for codebook in codebooks:
        quantized, indices, loss = fastvq.quantize(residual, codebook, **options)
        residuals.append(residual.detach())
        residual = residual - quantized.detach()
        total = total + quantized
        stages.append(indices)
        losses.append(loss)
    return total, torch.stack(stages, -1), torch.stack(losses), torch.stack(residuals)


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_stacked_calls(dtype, masked, gradient, weight, backend):
    x, codebooks = inputs(dtype=dtype)
    mask = torch.rand(len(x)) < 0.6 if masked else None
    options = {"gradient": gradient, "commitment_weight": weight, "mask": mask}
    upstream = torch.randn(x.shape, generator=generator(1), dtype=dtype)
    weights = torch.tensor([3.0, -1.0, 0.5], dtype=dtype)
    results = []
    with fastvq.use_backend(backend):
        for call in (lambda: fastvq.residual_quantize(x, codebooks, keep_residuals=True, **options),
                     lambda: stacked(x, codebooks, **options)):  # fmt: skip
            out = call()
            grad = torch.autograd.grad((out[0] * upstream).sum() + (weights * out[2]).sum(), x)
            results.append((*out, *grad))
    assert torch.equal(results[0][1], results[1][1])
    for a, b in zip(results[0], results[1], strict=True):
        close(a, b)


def test_shapes_and_what_has_a_gradient(backend):
    x, codebooks = inputs(n=24)
    images = x.detach().reshape(2, 3, 4, 7).requires_grad_()
    with fastvq.use_backend(backend):
        out = fastvq.residual_quantize(images, codebooks, keep_residuals=True)
        flat = fastvq.residual_quantize(x, codebooks)
    assert out.quantized.shape == images.shape
    assert out.indices.shape == (2, 3, 4, 3)
    assert out.residuals.shape == (3, 2, 3, 4, 7)
    assert flat.residuals.shape == (0, 24, 7)
    assert torch.equal(out.quantized.flatten(0, 2), flat.quantized)
    assert torch.equal(flat.indices, fastvq.residual_search(x, codebooks))
    assert not out.residuals.requires_grad
    assert out.losses.requires_grad
    close(
        out.quantized, sum(lookup(codes, stage) for codes, stage in zip(codebooks, out.indices.unbind(-1), strict=True))
    )
    assert fastvq.residual_quantize(images.detach(), codebooks).losses.requires_grad is False
    (only_losses,) = torch.autograd.grad(flat.losses.sum(), x, retain_graph=True)
    (only_quantized,) = torch.autograd.grad(flat.quantized.sum(), x)
    close(only_quantized, torch.full_like(x, 3.0))
    assert only_losses.abs().sum() > 0


def test_codebooks_may_learn_before_the_backward(backend):
    x, codebooks = inputs()
    with fastvq.use_backend(backend):
        expected = torch.autograd.grad(fastvq.residual_quantize(x, codebooks, gradient="rotation").losses.sum(), x)
        moved = codebooks.clone()
        losses = fastvq.residual_quantize(x, moved, gradient="rotation").losses.sum()
        moved.zero_()
        assert torch.equal(torch.autograd.grad(losses, x)[0], expected[0])
        moved = codebooks.clone()
        losses = fastvq.residual_quantize(x, moved, copy_codebooks=False).losses.sum()
        moved.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(losses, x)


def test_given_indices(backend):
    x, codebooks = inputs()
    with fastvq.use_backend(backend):
        indices = fastvq.residual_search(x, codebooks)
        indices[:, 2] = -1
        out = fastvq.residual_quantize(x, codebooks, indices=indices)
        two = fastvq.residual_quantize(x, codebooks[:2])
    assert torch.equal(out.quantized, two.quantized)
    close(out.losses[:2], two.losses)
    assert out.losses[2] == 0


def test_non_finite_rows_are_excluded(backend):
    x, codebooks = inputs()
    poisoned = x.detach().clone()
    poisoned[3, 2], poisoned[4] = torch.nan, torch.inf
    poisoned.requires_grad_()
    finite = poisoned.isfinite().all(1)
    with fastvq.use_backend(backend):
        out = fastvq.residual_quantize(poisoned, codebooks)
        kept = fastvq.residual_quantize(x[finite], codebooks)
    assert (out.indices[~finite] == -1).all()
    assert not out.quantized[~finite].any()
    close(out.losses, kept.losses)
    (grad,) = torch.autograd.grad(out.quantized.sum() + out.losses.sum(), poisoned)
    assert not grad[~finite].any()
    assert grad[finite].isfinite().all()


def test_compiles_without_a_break():
    x, codebooks = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(fastvq.residual_quantize, fullgraph=True, backend="aot_eager")
    for call in (fastvq.residual_quantize, compiled):
        out = call(x, codebooks, gradient="rotation", keep_residuals=True)
        (grad,) = torch.autograd.grad(out.quantized.square().sum() + out.losses.sum(), x)
        if call is fastvq.residual_quantize:
            expected = (*out, grad)
    for a, b in zip((*out, grad), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradient": "gumbel"}, ValueError, "gradient: must be one of ste, rotation"),
        ({"commitment_weight": -1.0}, ValueError, "commitment_weight: must not be negative"),
        (
            {"indices": torch.zeros(40, 2, dtype=torch.int64)},
            ValueError,
            r"indices: must have shape \(40, 3\) beside x",
        ),
        ({"mask": torch.ones(39, dtype=torch.bool)}, ValueError, r"mask: must have shape \(40,\)"),
        ({"x": torch.zeros(())}, ValueError, r"x: must have shape \(..., D\), got a scalar"),
        ({"codebooks": torch.zeros(3, 4)}, ValueError, r"codebooks: must have shape \(Q, K, D\)"),
    ],
)
def test_refuses_by_name(change, error, message):
    x, codebooks = inputs()
    with pytest.raises(error, match=message):
        fastvq.residual_quantize(**{"x": x, "codebooks": codebooks} | change)
