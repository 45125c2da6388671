"""The differentiable functions of soft assignments, against torch's own operations on the N x K matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastvq
from fastvq.ops import soft_assign_forward

from ..cases import TOLERANCE, generator, require_support
from ..ops.test_soft_assign import METRICS, RELATIVE, dense_scores, leaves, loss


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric, backend):
    require_support(backend, "soft_assign_forward", torch.float64)
    x, codebook = leaves(torch.randn(2, 5, 3), torch.randn(4, 3), dtype=torch.float64)
    with fastvq.use_backend(backend):
        for floor in (0.0, 0.1):
            options = {"metric": metric, "scale": 0.7, "floor": floor}
            assert torch.autograd.gradcheck(lambda x, e, o=options: fastvq.soft_assign(x, e, **o), (x, codebook))
        indices = torch.tensor([[0, 1, -1, 3, 2], [3, 3, 1, 0, -1]])
        assert torch.autograd.gradcheck(
            lambda x, e: fastvq.cross_entropy(x, e, indices, metric=metric, scale=0.7), (x, codebook)
        )
        assert torch.autograd.gradcheck(
            lambda x, e: fastvq.mean_assignment_entropy(x, e, metric=metric, scale=0.7), (x, codebook)
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_is_that_of_torch(metric, dtype, backend, small_tiles):
    x, codebook = torch.randn(4, 15, 6, generator=generator()).to(dtype), torch.randn(30, 6, generator=generator(1))
    indices = torch.randint(-1, 30, (4, 15), generator=generator())
    mask = torch.rand(4, 15, generator=generator()) < 0.7
    inputs, wide = leaves(x, codebook), leaves(x, codebook, dtype=torch.float64)
    scores = 1.5 * dense_scores(*wide, metric)
    expected = F.cross_entropy(scores.flatten(0, 1), indices.masked_fill(~mask, -1).flatten(), ignore_index=-1)
    with fastvq.use_backend(backend):
        actual = fastvq.cross_entropy(*inputs, indices, metric=metric, scale=1.5, mask=mask)
    expected.backward()
    actual.backward()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), **TOLERANCE[torch.float32])
    for one, other in zip(inputs, wide, strict=True):
        assert (one.grad - other.grad).abs().max() <= 1.5 * RELATIVE[one.dtype] * other.grad.abs().max()


@pytest.mark.parametrize("size", [1e2, 1e5, 1e8, 1e12])
@pytest.mark.parametrize("metric", METRICS)
def test_ties_at_any_size(metric, size, backend, small_tiles):
    """Two equal codes have half the probability each, even where adding the logarithm of 2 to their logit rounds."""
    length = size if metric == "distance" else size**0.5
    x, codebook = (length * torch.randn(s, 6, generator=generator(s)) for s in (7, 5))
    codebook, indices = codebook.repeat(2, 1), torch.arange(7) % 10
    inputs, wide = leaves(x, codebook), leaves(x, codebook, dtype=torch.float64)
    scores = dense_scores(*wide, metric)
    nearest = scores.argmax(1)
    expected = F.cross_entropy(scores, nearest) + 1e-3 * F.cross_entropy(scores, indices)
    with fastvq.use_backend(backend):
        actual = fastvq.cross_entropy(*inputs, nearest, metric=metric)
        actual = actual + 1e-3 * fastvq.cross_entropy(*inputs, indices, metric=metric)
        grads = torch.autograd.grad(actual, inputs)
        assigned = fastvq.soft_assign(x, codebook, metric=metric)
        looked_up = fastvq.soft_lookup(x, inputs[1], indices, metric=metric).sum() / length
        code_grad = torch.autograd.grad(looked_up, inputs[1])[0]
        log_sum = soft_assign_forward(x[None], codebook, None, metric=metric, scale=1.0, floor=0.0, statistics=False)[1]
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(assigned.mean, scores.softmax(1).mean(0).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_sum, (scores - scores.amax(1, keepdim=True)).logsumexp(1)[None].float())
    onehot = F.one_hot(indices, 10) + scores.softmax(1) - scores.softmax(1).detach()
    dense = torch.autograd.grad(expected, wide, retain_graph=True)
    dense += torch.autograd.grad((onehot @ wide[1]).sum() / length, wide[1])
    for one, other in zip((*grads, code_grad), dense, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_cross_entropy_beside_a_code_that_is_not_finite(backend):
    """Its probability is zero, so that the loss is infinite, and no gradient passes through it."""
    x, codebook = leaves(torch.randn(3, 4), torch.randn(5, 4))
    with torch.no_grad():
        codebook[2, 1] = torch.nan
    with fastvq.use_backend(backend):
        loss = fastvq.cross_entropy(x, codebook, torch.tensor([0, 2, 1]))
        loss.backward()
    assert loss == torch.inf
    assert bool(x.grad.isfinite().all())
    assert not codebook.grad[2].any()


def test_cross_entropy_of_nothing_is_zero(backend):
    x, codebook = leaves(torch.full((3, 4), torch.nan), torch.randn(5, 4))
    with fastvq.use_backend(backend):
        result = fastvq.cross_entropy(x, codebook, torch.tensor([0, 1, -1]))
    result.backward()
    assert result == 0
    assert not x.grad.any()
    assert not codebook.grad.any()


@pytest.mark.parametrize("budget", [1 << 20, 60])
@pytest.mark.parametrize("metric", METRICS)
def test_mean_assignment_entropy(metric, budget, backend, monkeypatch):
    """The mean is taken over the batch alone, and its entropy has a floor, as in the codebook diversity loss."""
    monkeypatch.setitem(fastvq.mean_assignment_entropy.__globals__, "LARGEST_MEAN", budget)
    x, codebook = torch.randn(6, 11, 5, generator=generator()), torch.randn(23, 5, generator=generator(1))
    inputs, wide = leaves(x, codebook), leaves(x, codebook, dtype=torch.float64)
    mean = (4.0 * dense_scores(*wide, metric)).softmax(-1).mean(0)
    expected = -(mean * mean.clamp_min(1e-3).log()).sum(-1).mean()
    with fastvq.use_backend(backend):
        actual = fastvq.mean_assignment_entropy(*inputs, metric=metric, scale=4.0, floor=1e-3)
        actual.backward()
        mask = torch.ones(6, 11, dtype=torch.bool)
        mask[2], mask[:, 5] = False, False
        masked = fastvq.mean_assignment_entropy(x, codebook, metric=metric, scale=4.0, floor=1e-3, mask=mask)
        others = x[[0, 1, 3, 4, 5]][:, [i for i in range(11) if i != 5]]
        torch.testing.assert_close(
            masked, fastvq.mean_assignment_entropy(others, codebook, metric=metric, scale=4.0, floor=1e-3)
        )
    expected.backward()
    torch.testing.assert_close(actual, expected.float(), **TOLERANCE[torch.float32])
    for one, other in zip(inputs, wide, strict=True):
        torch.testing.assert_close(one.grad, other.grad.float(), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("metric", METRICS)
def test_soft_lookup_is_the_straight_through_softmax(metric, backend, small_tiles):
    x, codebook = torch.randn(3, 9, 5, generator=generator()), torch.randn(30, 5, generator=generator(1))
    indices = torch.randint(-1, 30, (3, 9), generator=generator())
    weight = torch.randn(3, 9, 5, generator=generator())
    inputs, wide = leaves(x, codebook), leaves(x, codebook, dtype=torch.float64)
    p = (2.0 * dense_scores(*wide, metric)).softmax(-1)
    onehot = F.one_hot(indices.clamp_min(0), 30) + p - p.detach()
    expected = (onehot @ wide[1]).masked_fill((indices < 0)[..., None], 0)
    with fastvq.use_backend(backend):
        actual = fastvq.soft_lookup(*inputs, indices, metric=metric, scale=2.0)
        (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(actual[indices >= 0], codebook[indices[indices >= 0]])
    assert not actual[indices < 0].any()
    for one, other in zip(inputs, wide, strict=True):
        assert (one.grad - other.grad).abs().max() <= 2e-5 * other.grad.abs().max()


@pytest.mark.parametrize("index", [-2, 6])
@pytest.mark.parametrize("function", [fastvq.cross_entropy, fastvq.soft_lookup])
def test_an_index_out_of_range(function, index, backend):
    with fastvq.use_backend(backend), pytest.raises(IndexError, match=rf"indices: must lie in \[-1, 6\), got {index}"):
        function(torch.randn(2, 4), torch.randn(6, 4), torch.tensor([0, index]))


def test_a_codebook_may_learn_before_the_backward(backend):
    x, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(6, 4)
    with fastvq.use_backend(backend):
        expected = torch.autograd.grad(fastvq.cross_entropy(x, codebook, torch.arange(9) % 6), x)[0]
        result = fastvq.cross_entropy(x, codebook, torch.arange(9) % 6)
        codebook.mul_(2)
        assert torch.equal(torch.autograd.grad(result, x)[0], expected)


def test_compiles_without_a_break():
    indices = torch.arange(10) % 7

    def step(x, codebook):
        total = loss(*fastvq.soft_assign(x, codebook, metric="l2")) + fastvq.cross_entropy(x, codebook, indices)
        total = total + fastvq.mean_assignment_entropy(x[None], codebook)
        return total + fastvq.soft_lookup(x, codebook, indices).square().sum()

    inputs = leaves(torch.randn(10, 5), torch.randn(7, 5))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = (torch.autograd.grad(run(*inputs), inputs) for run in (step, compiled))
    torch.testing.assert_close(actual, expected)
