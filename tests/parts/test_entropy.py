"""Entropies of soft assignments, and index backpropagation, compared with autograd on dense softmaxes."""

from __future__ import annotations

import math

import pytest
import torch

import fastvq
from fastvq.parts.losses import assignment_entropies, binary_entropies, entropy, entropy_loss, random_subset
from fastvq.parts.tables import index_backpropagation

from ..cases import close, generator


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
    (x, mask, counted), codebook = masked(), vectors(17, 5, seed=1).requires_grad_()
    x.requires_grad_()
    found = assignment_entropies(x, codebook, metric=metric, temperature=temperature, mask=mask)
    dense_x = x.detach().clone().requires_grad_()
    dense_codebook = codebook.detach().clone().requires_grad_()
    log_p = (scores(dense_x[counted], dense_codebook, metric) / temperature).log_softmax(-1)
    p = log_p.exp()
    expected = -(p * log_p).sum(-1).mean(), torch.special.entr(p.mean(0) + 1e-300).sum()
    close(tuple(found), expected)
    (found.per_sample - 0.7 * found.batch).backward()
    (expected[0] - 0.7 * expected[1]).backward()
    torch.testing.assert_close(x.grad[counted], dense_x.grad[counted], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(codebook.grad, dense_codebook.grad, rtol=1e-7, atol=1e-9)
    assert not x.grad[~counted].any()
    loss = entropy_loss(x, codebook, gamma=0.7, metric=metric, temperature=temperature, mask=mask)
    close(loss, expected[0] - 0.7 * expected[1])


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


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_index_backpropagation(metric):
    (x, mask, counted), codebook = masked(), vectors(17, 5, seed=1).requires_grad_()
    x.requires_grad_()
    upstream = vectors(3, 11, 5, seed=2)
    quantized, indices = index_backpropagation(x, codebook, metric=metric, scale=1.5, mask=mask)
    dense_x = x.detach().clone().requires_grad_()
    dense_codebook = codebook.detach().clone().requires_grad_()
    s = scores(dense_x[counted], dense_codebook, metric)
    p = (1.5 * s).softmax(-1)
    onehot = torch.nn.functional.one_hot(s.argmax(-1), 17)
    expected = (onehot + p - p.detach()) @ dense_codebook
    close(quantized[counted], expected)
    assert torch.equal(quantized[counted], codebook[s.argmax(-1)])
    assert torch.equal(indices[counted], s.argmax(-1))
    assert (indices[~counted] == -1).all()
    assert not quantized[~counted].any()
    (quantized * upstream).sum().backward()
    (expected * upstream[counted]).sum().backward()
    close(x.grad[counted], dense_x.grad[counted])
    close(codebook.grad, dense_codebook.grad)
    assert not x.grad[~counted].any()
    assert codebook.grad.ne(0).all()


def test_index_backpropagation_learns_codes_that_no_vector_chooses():
    torch.manual_seed(0)
    codebook = torch.nn.Parameter(torch.cat([torch.zeros(1, 2), 3 + torch.rand(7, 2)]))
    x = torch.randn(64, 2, generator=generator())
    optimizer = torch.optim.Adam([codebook], lr=0.05)
    for _ in range(200):
        quantized, indices = index_backpropagation(x, codebook, metric="l2")
        (quantized - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(indices.unique()) > 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy_loss(torch.zeros(3, 2), torch.zeros(4, 2), temperature=0.0), "temperature: must be positive"),
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
