"""Orthogonality by its definition, used codes, squared errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastvq.parts.losses import mean_squared_errors, orthogonality, used_codes

from ..cases import close, generator


def by_definition(codes):
    """Return |E' E'^T - 1|_F^2 / K^2, averaged over codebooks."""
    normed = F.normalize(codes, dim=-1, eps=1e-6)
    return (normed @ normed.mT - torch.eye(codes.shape[1], dtype=codes.dtype)).square().mean((1, 2)).mean()


@pytest.mark.parametrize("shape", [(1, 20, 4), (1, 3, 16), (2, 7, 7), (3, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonality(shape, dtype):
    codes = torch.randn(shape, generator=generator(), dtype=dtype)
    codes[0, 0] = 0  # has no direction
    mine, other = codes.clone().requires_grad_(), codes.clone().requires_grad_()
    loss, expected = orthogonality(mine), by_definition(other)
    close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_orthogonal_codes_have_none():
    codes = torch.linalg.qr(torch.randn(6, 6, generator=generator())).Q[None] * torch.arange(1, 7)[:, None]
    assert orthogonality(codes).abs() < 1e-6
    assert orthogonality(torch.ones(1, 5, 3)) > 0.7


def test_used_codes_alone():
    codes = torch.randn(2, 10, 3, generator=generator())
    used = torch.rand(2, 10, generator=generator(1)) < 0.5
    expected = torch.stack([by_definition(c[u][None]) for c, u in zip(codes, used, strict=True)]).mean()
    close(orthogonality(codes, used), expected)
    assert orthogonality(codes, torch.zeros_like(used)) == 0


def test_at_most_that_many():
    """Of three codes, two are equal: a pair of them is either parallel or not."""
    codes = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]])
    found = {round(orthogonality(codes, most=2).item(), 4) for _ in range(50)}
    assert found == {0.0, 0.5}
    used = torch.tensor([[True, False, True]])
    assert {orthogonality(codes, used, most=2).item() for _ in range(20)} == {0.0}
    with pytest.raises(ValueError, match="most: must be at least 1"):
        orthogonality(codes, most=0)
    with pytest.raises(ValueError, match="used: must be bool"):
        orthogonality(codes, used[:, :2])


def test_used_codes_of_indices():
    indices = torch.tensor([[0, 2, -1, 2], [-1, -1, -1, -1]])
    assert used_codes(indices, 3).tolist() == [[True, False, True], [False] * 3]


def test_mean_squared_errors_exclude_absent_codes():
    x, codes = torch.randn(2, 5, 3, generator=generator()), torch.randn(2, 5, 3, generator=generator(1))
    indices = torch.tensor([[0, 1, -1, 2, 3], [4, 0, 0, -1, -1]])
    x[indices < 0] = torch.nan
    x.requires_grad_()
    errors = mean_squared_errors(x, codes, indices)
    close(errors[indices >= 0], (x - codes).square().mean(-1)[indices >= 0])
    assert not errors[indices < 0].any()
    errors.sum().backward()
    assert x.grad.isfinite().all()
