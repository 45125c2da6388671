"""The op `binary_assign`, against the softmax over the matrix of all vectors of signs."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.ops import binary_assign_backward

from ..cases import TOLERANCE, generator, require_support

# R, D, scale, floor: one bit, odd halves, saturated, nearly uniform, below the floor everywhere.
CASES = [
    (5, 1, 1.0, 0.0),
    (7, 2, 0.3, 1e-5),
    (9, 5, 3.0, 1e-5),
    (33, 8, 30.0, 1e-5),
    (6, 9, 0.01, 0.1),
    (4, 3, 0.0, 0.2),
]


@pytest.fixture(autouse=True)
def _supported(backend):
    require_support(backend, "binary_assign_forward")


def dense(x, scale, floor, mask):
    """Compute in float64 over the matrix of all pairs, as LFQ does, on the rows that take part."""
    dim = x.shape[-1]
    bits = torch.arange(2**dim)[:, None].int() & 2 ** torch.arange(dim - 1, -1, -1) != 0
    codes = torch.where(bits, 1.0, -1.0).double()
    row_mask = mask & x.isfinite().all(-1)
    p = (scale * x.double().masked_fill(~row_mask[..., None], 0) @ codes.T).softmax(-1)
    p = p * row_mask[..., None]
    entropy = -(p * p.clamp_min(floor if floor else 1e-300).log()).sum(-1)
    return entropy, p.sum(-2) / row_mask.sum(-1, keepdim=True).clamp_min(1)


def loss(entropy, mean):
    weight = torch.linspace(0.5, 1.5, entropy.shape[-1], dtype=entropy.dtype)
    return (entropy * weight).sum() - (mean * (mean + 0.01).log()).sum()


@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "dim", "scale", "floor"), CASES)
def test_equals_the_dense_softmax(rows, dim, scale, floor, dtype, groups, backend, monkeypatch):
    monkeypatch.setattr("fastvq.backends.torch.binary_assign._rows_at_once", lambda x: 4)
    x = torch.randn(*groups, rows, dim, generator=generator(), dtype=dtype)
    x[..., 1, 0] = torch.nan
    mask = torch.rand(*groups, rows, generator=generator()) < 0.8
    wide, own = x.double().clone().requires_grad_(), x.clone().requires_grad_()
    expected = dense(wide, scale, floor, mask)
    loss(*expected).backward()
    with fastvq.use_backend(backend):
        actual = fastvq.binary_assign(own, scale=scale, floor=floor, mask=mask)
        loss(*actual).backward()
    assert actual.mean.dtype == own.grad.dtype == dtype
    for one, other in [*zip(actual, expected, strict=True), (own.grad, wide.grad.nan_to_num())]:
        torch.testing.assert_close(one, other.to(dtype), **TOLERANCE[dtype])
    assert not own.grad[~(mask & x.isfinite().all(-1))].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_exactly(dtype, backend):
    x = torch.randn(20, 6).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    with fastvq.use_backend(backend):
        results = [fastvq.binary_assign(t, scale=2.0, floor=1e-5) for t in (x, wide)]
        for result in results:
            loss(*result).backward()
    assert torch.equal(results[0].mean, results[1].mean)
    assert results[0].mean.dtype == torch.float32
    assert torch.equal(x.grad, wide.grad.to(dtype))


def test_one_gradient_alone(backend):
    x, entropy_grad, mean_grad = torch.randn(1, 9, 5), torch.randn(1, 9), torch.randn(1, 32)
    with fastvq.use_backend(backend):
        run = [
            binary_assign_backward(x, None, *grads, scale=1.5, floor=1e-5)
            for grads in [(entropy_grad, mean_grad), (entropy_grad, None), (None, mean_grad), (None, None)]
        ]
    torch.testing.assert_close(run[0], run[1] + run[2])
    assert not run[3].any()


def test_extreme_rows(backend):
    """A saturated row has entropy 0 and a finite gradient; without any row the mean is 0."""
    x = torch.tensor([[1e30, -1e30, 1e30], [1e-30, 0.0, -1e-30], [3e38, 3e38, -3e38]], requires_grad=True)
    with fastvq.use_backend(backend):
        entropy, mean = fastvq.binary_assign(x, scale=100.0, floor=1e-5)
        (entropy.sum() + mean.square().sum()).backward()
        empty = fastvq.binary_assign(torch.empty(0, 3))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 3 * torch.tensor(2.0).log(), 0.0]))
    assert mean.argsort(descending=True)[:2].tolist() == [5, 6]
    assert x.grad.isfinite().all()
    assert empty.entropy.shape == (0,)
    assert torch.equal(empty.mean, torch.zeros(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3)}, r"x: must have shape \(G, R, D\), got \(3,\)"),
        ({"x": torch.zeros(2, 31)}, r"x: must have D in \[1, 30\]"),
        ({"x": torch.zeros(2, 3), "scale": -1.0}, "scale: must not be negative, got -1.0"),
        ({"x": torch.zeros(2, 3), "floor": 1.0}, r"floor: must lie in \[0, 1\), got 1.0"),
        ({"x": torch.zeros(2, 3), "mask": torch.ones(3, dtype=torch.bool)}, "mask: must have shape"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastvq.binary_assign(**arguments)
