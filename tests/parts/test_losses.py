"""Losses: orthogonality by its definition, used codes, squared errors, and entropies against dense softmaxes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import fastvq
from fastvq.parts.losses import (
    assignment_entropies,
    binary_entropies,
    entropy,
    entropy_loss,
    mean_squared_errors,
    orthogonality,
    random_subset,
    used_codes,
)
from fastvq.parts.tables import index_backpropagation

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
    """Two of three codes are equal: a pair of them is either parallel or not."""
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


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def scores(x, codebook, metric):
    return x @ codebook.T if metric == "dot" else -torch.cdist(x, codebook).square()


def masked():
    """Return vectors with a non-finite one, a mask, and the mask of rows that take part."""
    x, mask = vectors(3, 11, 5), torch.rand(3, 11, generator=generator()) < 0.7
    mask[0, 0] = True
    x[0, 0, 2] = torch.nan
    return x, mask, mask & x.isfinite().all(-1)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_entropies_are_those_of_the_softmax(metric, temperature):
    (x, mask, row_mask), codebook = masked(), vectors(17, 5, seed=1).requires_grad_()
    x.requires_grad_()
    found = assignment_entropies(x, codebook, metric=metric, temperature=temperature, mask=mask)
    dense_x = x.detach().clone().requires_grad_()
    dense_codebook = codebook.detach().clone().requires_grad_()
    log_p = (scores(dense_x[row_mask], dense_codebook, metric) / temperature).log_softmax(-1)
    p = log_p.exp()
    expected = -(p * log_p).sum(-1).mean(), torch.special.entr(p.mean(0) + 1e-300).sum()
    close(tuple(found), expected)
    (found.per_sample - 0.7 * found.batch).backward()
    (expected[0] - 0.7 * expected[1]).backward()
    torch.testing.assert_close(x.grad[row_mask], dense_x.grad[row_mask], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(codebook.grad, dense_codebook.grad, rtol=1e-7, atol=1e-9)
    assert not x.grad[~row_mask].any()
    loss = entropy_loss(x, codebook, gamma=0.7, metric=metric, temperature=temperature, mask=mask)
    close(loss, expected[0] - 0.7 * expected[1])


def test_eps_is_that_of_llamagen():
    """LlamaGen and IBQ add 1e-5 to the mean in its logarithm: with many codes this changes the gradient by percents."""
    x, codebook = vectors(64, 8), vectors(16384, 8, seed=1)
    x, codebook = (torch.nn.functional.normalize(t, dim=-1).requires_grad_() for t in (x, codebook))
    logits = scores(x, codebook, "l2") / 0.01
    p, log_p = logits.softmax(-1), (logits + 1e-5).log_softmax(-1)
    mean = p.mean(0)
    expected = -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
    expected_grads = torch.autograd.grad(expected, (x, codebook))
    loss = entropy_loss(x, codebook, eps=1e-5)
    close(loss, expected)
    exact = torch.autograd.grad(entropy_loss(x, codebook), (x, codebook))
    found_grads = torch.autograd.grad(loss, (x, codebook))
    for name, found, grad, other in zip(("x", "codebook"), found_grads, expected_grads, exact, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-6, atol=1e-10)
        with_eps, without = (float((one - grad).norm() / grad.norm()) for one in (found, other))
        print(f"gradient of the {name}, K=16384: differs by {with_eps:.0e} with eps=1e-5, by {without:.1%} with eps=0")
        assert without > 0.04


def test_the_loss_ranks_assignments():
    codes = 10 * torch.eye(4)
    spread, lumped, unsure = codes, codes[:1].expand(4, 4), torch.full((4, 4), 2.5)
    values = [float(entropy_loss(x, codes, temperature=1.0)) for x in (spread, lumped, unsure)]
    assert values == pytest.approx([-math.log(4), 0, 0], abs=1e-3)


def test_binary_entropies_equal_those_of_the_corners():
    x, mask = vectors(9, 2, 4).requires_grad_(), torch.arange(9) != 4
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    found = binary_entropies(x, mask, sharpness=0.8)
    p = (0.8 * x[mask] @ corners.T).softmax(-1)
    close(tuple(found), (entropy(p).mean(), entropy(p.mean(0)).mean()))
    (grad,) = torch.autograd.grad(found.per_sample - 2 * found.batch, x)
    (expected,) = torch.autograd.grad(entropy(p).mean() - 2 * entropy(p.mean(0)).mean(), x)
    close(grad, expected)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.full((4, 3), torch.nan)])
def test_no_vectors_have_no_entropy(x):
    x.requires_grad_()
    found = assignment_entropies(x, torch.randn(5, 3))
    sum(found).backward()
    assert not any(found)
    assert not x.grad.any()


def test_a_full_share_is_the_whole_mask():
    mask = torch.rand(9, generator=generator()) < 0.5
    assert torch.equal(random_subset(mask, 1.0), mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy_loss(torch.zeros(3, 2), torch.zeros(4, 2), temperature=0.0), "temperature: must be positive"),
        (lambda: entropy_loss(torch.zeros(3, 2), torch.zeros(4, 2), eps=-1.0), "eps: must not be negative"),
        (
            lambda: entropy_loss(torch.zeros(3, 2), torch.zeros(4, 2), mask=torch.ones(4).bool()),
            "mask: must have shape",
        ),
        (lambda: index_backpropagation(torch.zeros(3, 2), torch.zeros(4, 3)), "codebook: must have the dimension"),
        (lambda: index_backpropagation(torch.zeros(3, 2), torch.zeros(4, 2), metric="distance"), "metric: must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_compiled():
    torch.compiler.reset()
    codebook = torch.nn.Parameter(torch.randn(9, 4, generator=generator()))

    def loss(x):
        quantized, indices = index_backpropagation(x, codebook)
        step = fastvq.quantize(x, codebook, indices=indices, codebook_weight=1.0)
        return quantized.square().mean() + step.loss + 0.1 * entropy_loss(x, codebook, temperature=1.0)

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = torch.randn(20, 4, generator=generator(1)).requires_grad_()
        value = function(x)
        grads.append((value, *torch.autograd.grad(value, (x, codebook))))
    close(*grads)
