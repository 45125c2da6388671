"""The differentiable soft assignment to all vectors of signs."""

from __future__ import annotations

import torch

import fastvq

from ..cases import require_support
from ..ops.test_binary_assign import loss


def test_gradcheck():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for floor in (0.0, 0.05):
        assert torch.autograd.gradcheck(lambda x, f=floor: fastvq.binary_assign(x, scale=0.7, floor=f), x)


def test_autocast_changes_nothing(backend):
    require_support(backend, "binary_assign_forward")
    x = torch.randn(50, 8)
    with fastvq.use_backend(backend):
        expected = fastvq.binary_assign(x, scale=3.0, floor=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, fastvq.binary_assign(x, scale=3.0, floor=1e-5), expected))


def test_compiles_without_a_break():
    def step(x, mask):
        entropy, mean = fastvq.binary_assign(x, scale=2.0, floor=1e-5, mask=mask)
        return loss(entropy, mean)

    x, mask = torch.randn(12, 5, requires_grad=True), torch.rand(12) < 0.5
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = (torch.autograd.grad(run(x, mask), x)[0] for run in (step, compiled))
    torch.testing.assert_close(actual, expected)
