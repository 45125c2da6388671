"""Outputs, losses and gradients of `quantize`, against formulas differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import fastvq
from fastvq.backends import reference
from fastvq.backends.support import GRADIENTS
from fastvq.functional.quantize import _Quantize, lookup, unit_norm

from ..cases import HALF, close, generator


def inputs(n=40, k=12, d=7, dtype=torch.float32):
    g = generator()
    return [torch.randn(rows, d, generator=g).to(dtype).requires_grad_() for rows in (n, k)]


def householder_rotation(a, b):
    """Return the rotation that takes the direction of a to that of b, as two reflections.

    The first swaps a and -b, the second turns -b over. Source: Fifty et al. 2024, section 4.2.
    """
    a, b = a / a.norm(), b / b.norm()
    eye = torch.eye(len(a), dtype=a.dtype)
    bisector = (a + b) / (a + b).norm()
    return (eye - 2 * torch.outer(b, b)) @ (eye - 2 * torch.outer(bisector, bisector))


def by_autograd(x, codebook, indices, row_mask, gradient, commitment_weight, codebook_weight):
    """Apply the docstring of `quantize`, with detach() for sg[], to the rows of the mask; the others are zero."""
    codes = lookup(codebook, indices)
    if gradient == "ste":
        estimate = x + (codes - x).detach()
    else:
        with torch.no_grad():
            turn = torch.stack([householder_rotation(a, b) for a, b in zip(x, codes, strict=True)])
            turn *= (codes.norm(dim=1) / x.norm(dim=1))[:, None, None]
        estimate = torch.einsum("nij,nj->ni", turn, x)
    quantized = torch.where(row_mask[:, None], estimate, 0.0)
    commitment = F.mse_loss(x[row_mask], codes.detach()[row_mask])
    pull = F.mse_loss(codes[row_mask], x.detach()[row_mask])
    return quantized, commitment_weight * commitment + codebook_weight * pull


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_autograd(dtype, masked, gradient, backend):
    for weights in ((1.0, 0.0), (0.25, 1.0), (0.0, 2.0), (0.0, 0.0)):
        x, codebook = inputs(dtype=dtype)
        mask = torch.rand(len(x)) < 0.6 if masked else torch.ones(len(x), dtype=torch.bool)
        with fastvq.use_backend(backend):
            out = fastvq.quantize(
                x, codebook, gradient=gradient, commitment_weight=weights[0], codebook_weight=weights[1], mask=mask
            )
        indices = reference.search(x.detach(), codebook.detach())
        assert torch.equal(out.indices, indices.masked_fill(~mask, -1))
        assert torch.equal(out.quantized, lookup(codebook, out.indices))
        expected, loss = by_autograd(x, codebook, indices, mask, gradient, *weights)
        close(out.quantized, expected)
        close(out.loss, loss)
        upstream = torch.randn(x.shape, generator=generator(1), dtype=dtype)
        actual_grads = torch.autograd.grad((out.quantized * upstream).sum() + 3 * out.loss, (x, codebook))
        total = (expected * upstream).sum() + 3 * loss
        expected_grads = torch.autograd.grad(total, (x, codebook), materialize_grads=True)
        close(actual_grads[0], expected_grads[0])
        # accumulate returns float32 sums
        close(actual_grads[1], expected_grads[1], torch.float32)


def test_gradcheck_of_the_losses():
    """Each loss is checked for the side that it moves, at the indices of the unperturbed inputs."""
    x, codebook = inputs(6, 4, 3, torch.float64)
    indices = reference.search(x.detach(), codebook.detach())
    indices[2] = -1

    def losses(x, codebook):
        return _Quantize.apply(x, codebook, indices, "ste")[1:]

    assert torch.autograd.gradcheck(lambda v: losses(v, codebook.detach())[0], x)
    assert torch.autograd.gradcheck(lambda e: losses(x.detach(), e)[1], codebook)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_excluded_rows(gradient, backend):
    """A masked or non-finite row has output and gradient zero and no part in the loss, and changes no other row."""
    x, codebook = inputs()
    poisoned = x.detach().clone()
    poisoned[3, 2], poisoned[4, 0], poisoned[5, 6] = torch.nan, torch.inf, -torch.inf
    poisoned[6] = 1e30
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[6:8] = False
    row_mask = mask & poisoned.isfinite().all(1)
    poisoned.requires_grad_()
    with fastvq.use_backend(backend):
        out = fastvq.quantize(poisoned, codebook, gradient=gradient, codebook_weight=1.0, mask=mask)
        grads = torch.autograd.grad(out.quantized.square().sum() + out.loss, (poisoned, codebook))
        kept = fastvq.quantize(x[row_mask], codebook, gradient=gradient, codebook_weight=1.0)
        kept_grads = torch.autograd.grad(kept.quantized.square().sum() + kept.loss, (x, codebook))
    assert bool((out.indices[~row_mask] == -1).all())
    assert not out.quantized[~row_mask].any()
    assert not grads[0][~row_mask].any()
    assert torch.equal(out.indices[row_mask], kept.indices)
    close(out.loss, kept.loss)
    close(grads[0][row_mask], kept_grads[0][row_mask])
    close(grads[1], kept_grads[1])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_all_rows_excluded(gradient):
    x, codebook = inputs()
    out = fastvq.quantize(x, codebook, gradient=gradient, mask=torch.zeros(len(x), dtype=torch.bool))
    (out.quantized.sum() + out.loss).backward()
    assert out.loss.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_rows(gradient):
    x, codebook = inputs(0)
    out = fastvq.quantize(x, codebook, gradient=gradient, codebook_weight=1.0)
    (out.quantized.sum() + out.loss).backward()
    assert (out.indices.shape, out.loss.item(), x.grad.shape) == ((0,), 0, (0, 7))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype, gradient):
    """Results equal those of the same values in float32, rounded at the end."""
    x, codebook = inputs(dtype=dtype)
    out = fastvq.quantize(x, codebook, gradient=gradient, codebook_weight=1.0)
    assert (out.quantized.dtype, out.loss.dtype) == (dtype, torch.float32)
    wide_x, wide_codebook = (t.detach().float().requires_grad_() for t in (x, codebook))
    wide = fastvq.quantize(wide_x, wide_codebook, gradient=gradient, codebook_weight=1.0)
    assert torch.equal(out.indices, wide.indices)
    assert torch.equal(out.loss, wide.loss)
    for result in (out, wide):
        (result.quantized.float().sum() + result.loss).backward()
    assert torch.equal(x.grad, wide_x.grad.to(dtype))
    assert torch.equal(codebook.grad, wide_codebook.grad.to(dtype))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_autocast(gradient):
    x, codebook = inputs()
    expected = fastvq.quantize(x, codebook, gradient=gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastvq.quantize(x, codebook, gradient=gradient)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)


def test_zero_vectors_have_no_direction():
    """The rotation falls back to straight-through if x or its code is zero, and turns opposite vectors over."""
    x = torch.tensor([[0.0, 0.0], [1e-9, 0.0], [0.1, 0.0], [-3.0, -4.0]], requires_grad=True)
    codebook = torch.tensor([[0.0, 0.0], [-4.0, -3.0]])
    out = fastvq.quantize(x, codebook, gradient="rotation", commitment_weight=0.0)
    upstream = torch.randn(4, 2)
    out.quantized.backward(upstream)
    assert torch.equal(x.grad[:3], upstream[:3])
    assert bool(x.grad.isfinite().all())
    opposite = torch.tensor([[1.0, 0.0]], requires_grad=True)
    fastvq.quantize(opposite, torch.tensor([[-1.0, 0.0]]), gradient="rotation").quantized.sum().backward()
    assert bool(opposite.grad.isfinite().all())


def test_rotation_keeps_angles():
    """The gradient has the same angle to x as the upstream gradient has to the code, and is stretched by |e| / |x|."""
    x, codebook = inputs(dtype=torch.float64)
    upstream = torch.randn(x.shape, dtype=torch.float64)
    out = fastvq.quantize(x, codebook, gradient="rotation", commitment_weight=0.0)
    (grad,) = torch.autograd.grad(out.quantized, x, upstream)
    stretch = out.quantized.norm(dim=1) / x.norm(dim=1)
    close(grad.norm(dim=1), stretch * upstream.norm(dim=1))
    close(vmap(torch.dot)(grad, unit_norm(x)), stretch * vmap(torch.dot)(upstream, unit_norm(out.quantized)))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_only_what_needs_a_gradient_gets_one(gradient):
    x, codebook = inputs()
    assert not fastvq.quantize(x.detach(), codebook.detach(), gradient=gradient).quantized.requires_grad
    fastvq.quantize(x.detach(), codebook, gradient=gradient, codebook_weight=1.0).loss.backward()
    assert codebook.grad.any()
    fastvq.quantize(x, codebook.detach(), gradient=gradient).loss.backward()
    assert x.grad.any()
    quantized, _, _ = fastvq.quantize(x, codebook, gradient=gradient)
    assert not torch.autograd.grad(quantized.sum(), codebook, materialize_grads=True)[0].any()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 7), (2, 0, 7)], ids=str)
def test_leading_shapes(shape):
    x, codebook = torch.randn(shape), inputs()[1]
    mask = torch.rand(shape[:-1]) < 0.5
    out = fastvq.quantize(x, codebook, mask=mask)
    assert (out.quantized.shape, out.indices.shape, out.loss.shape) == (shape, shape[:-1], ())
    flat = fastvq.quantize(x.reshape(-1, 7), codebook, mask=mask.reshape(-1))
    assert torch.equal(out.quantized.reshape(-1, 7), flat.quantized)


def test_writing_to_the_output_changes_nothing_else():
    """Neither the codebook nor the backward depends on the memory of the output."""
    x, codebook = inputs()
    before = codebook.detach().clone()
    out = fastvq.quantize(x, codebook)
    expected = torch.autograd.grad(out.loss, x, retain_graph=True)[0]
    with torch.no_grad():
        out.quantized.fill_(torch.nan)
    assert torch.equal(torch.autograd.grad(out.loss, x)[0], expected)
    assert torch.equal(codebook, before)


def test_metric_dot():
    x, codebook = inputs()
    assert torch.equal(fastvq.quantize(x, codebook, metric="dot").indices, reference.search(x, codebook, metric="dot"))


def test_lookup():
    codebook = torch.randn(4, 3, requires_grad=True)
    indices = torch.tensor([[0, -1], [3, 3]])
    codes = lookup(codebook, indices)
    assert torch.equal(codes, torch.stack([codebook[0], torch.zeros(3), codebook[3], codebook[3]]).view(2, 2, 3))
    codes.sum().backward()
    assert codebook.grad[:, 0].tolist() == [1, 0, 0, 2]


X, CODEBOOK = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "gumbel"}, ValueError, "gradient: must be one of ste, rotation, got 'gumbel'"),
        ({"commitment_weight": -1.0}, ValueError, "commitment_weight: must not be negative"),
        ({"codebook_weight": float("nan")}, ValueError, "codebook_weight: must not be negative"),
        ({"mask": torch.ones(3)}, TypeError, "mask: must be bool, got torch.float32"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask: must have shape \(3,\), got \(4,\)"),
        ({"metric": "cosine"}, ValueError, "metric: must be"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: must have shape \(..., D\), got a scalar"),
        ({"x": X.long()}, TypeError, "x: must be float32"),
        ({"codebook": CODEBOOK[:, :2]}, ValueError, "codebook: must have the dimension of x"),
        ({"codebook": CODEBOOK[:0]}, ValueError, "codebook: must hold at least one code"),
    ],
)
def test_refuses_by_name(options, error, message):
    with pytest.raises(error, match=message):
        fastvq.quantize(**{"x": X, "codebook": CODEBOOK, **options})
