"""Gradient estimators: values bit for bit, gradients compared with their equations."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacrev
from vector_quantize_pytorch import vector_quantize_pytorch as peer

from fastvq.parts import directional_reparam, rotate_to, scale_gradient, straight_through, synchronous

from ..cases import DTYPES, close, generator


def vectors(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", [straight_through, rotate_to])
def test_the_value_is_the_code(estimator, dtype):
    x, q = vectors(3, 5, 8, dtype=dtype).requires_grad_(), vectors(3, 5, 8, seed=1)
    out = estimator(x, q)
    assert out.dtype == dtype
    assert torch.equal(out, q.to(dtype))
    out.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("estimator", [straight_through, rotate_to])
def test_gradients_are_the_peers(estimator):
    x, q, upstream = vectors(3, 5, 8).requires_grad_(), vectors(3, 5, 8, seed=1).requires_grad_(), vectors(3, 5, 8)
    y = x.detach().clone().requires_grad_()
    estimator(x, q).backward(upstream)
    getattr(peer, estimator.__name__)(y, q.detach()).backward(upstream)
    close(x.grad, y.grad)
    assert q.grad is None


def test_the_rotation_takes_x_to_q():
    x, q = vectors(1, 7).double(), vectors(1, 7, seed=1).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: rotate_to(x, q), x)[0, :, 0]
    close(jacobian @ x[0], q[0])
    close(jacobian @ jacobian.T, torch.eye(7).double() * (q.norm() / x.norm()) ** 2)


@pytest.mark.parametrize("estimator", [straight_through, rotate_to])
def test_a_row_without_a_code_takes_no_gradient(estimator):
    x, indices = vectors(4, 8).requires_grad_(), torch.tensor([2, -1, 0, -1])
    with torch.no_grad():
        x[1] = torch.nan
    estimator(x, torch.ones(4, 8), indices).sum().backward()
    assert x.grad[indices < 0].eq(0).all()
    assert x.grad[indices >= 0].ne(0).any(1).all()


def test_directional_reparam():
    """The value is as far from x as q, and near q; the gradient is that of the length along a fixed direction."""
    x, q, upstream = vectors(50, 8).requires_grad_(), vectors(50, 8, seed=1).requires_grad_(), vectors(50, 8, seed=2)
    y, p = (t.detach().clone().requires_grad_() for t in (x, q))
    torch.manual_seed(0)
    out = directional_reparam(x, q, 1e-2)
    torch.manual_seed(0)
    expected = peer.directional_reparam(y, p, 1e-2)
    close(out, expected)
    close((out - x).norm(dim=1), (q - x).norm(dim=1))
    out.backward(upstream)
    expected.backward(upstream)
    close(x.grad, y.grad)
    close(q.grad, p.grad)
    close(directional_reparam(x, q, 0.0), q)


def test_directional_reparam_where_x_is_the_code():
    x = vectors(5, 8).requires_grad_()
    directional_reparam(x, x.detach().clone()).sum().backward()
    assert x.grad.isfinite().all()


def test_synchronous_gives_the_codes_their_share():
    x, codes, upstream = vectors(5, 8).requires_grad_(), vectors(5, 8, seed=1).requires_grad_(), vectors(5, 8, seed=2)
    out = synchronous(straight_through(x, codes), codes, 0.25)
    assert torch.equal(out, codes)
    out.backward(upstream)
    close(x.grad, upstream)
    close(codes.grad, 0.25 * upstream)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_scale_gradient(factor):
    close(jacrev(lambda x: scale_gradient(x, factor))(torch.ones(3)), factor * torch.eye(3))


def test_refuses():
    with pytest.raises(ValueError, match="q: must have the shape of x"):
        straight_through(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="noise_variance: must not be negative"):
        directional_reparam(torch.zeros(3, 2), torch.zeros(3, 2), -1.0)
