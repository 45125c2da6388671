"""Soft assignments: what a softmax over the whole N x K matrix gives, which is never made."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

import fastvq

from ..cases import TOLERANCE, generator

METRICS = ("distance", "l2", "dot")
# R, K, D, scale, floor
CASES = [(5, 1, 1, 1.0, 0.0), (9, 7, 3, 2.0, 1e-2), (40, 50, 8, 0.5, 1e-5), (17, 33, 16, 3.0, 0.0)]

RELATIVE = {dtype: options["rtol"] for dtype, options in TOLERANCE.items()}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and chunks in both directions."""
    monkeypatch.setattr("fastvq.backends.torch.search.TILE_CODES", 13)
    monkeypatch.setattr("fastvq.backends.torch.search.tile_elements", lambda device: 13 * 12)


def dense_scores(x, codebook, metric):
    if metric == "dot":
        return x @ codebook.T
    squares = (x.unsqueeze(-2) - codebook).square().sum(-1)
    if metric == "l2":
        return -squares
    zero = squares == 0
    return -squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def dense(x, codebook, metric, scale, floor, mask):
    """In torch's own operations, of the rows that count."""
    counted = mask & x.isfinite().all(-1)
    logits = scale * dense_scores(x.masked_fill(~counted[..., None], 0), codebook, metric)
    p = logits.softmax(-1) * counted[..., None]
    entropy = -(p * p.clamp_min(max(floor, 1e-300)).log()).sum(-1)
    mean = p.sum(-2) / counted.sum(-1, keepdim=True).clamp_min(1)
    return logits.logsumexp(-1) * counted, entropy, mean


def loss(logsumexp, entropy, mean):
    weight = torch.linspace(0.5, 1.5, entropy.shape[-1], dtype=entropy.dtype)
    return (logsumexp * weight.flip(0)).sum() + (entropy * weight).sum() - (mean * (mean + 0.01).log()).sum()


def leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "size", "dim", "scale", "floor"), CASES)
def test_equals_the_dense_softmax(rows, size, dim, scale, floor, dtype, metric, backend, small_tiles):
    g = generator()
    for groups in ((), (3,)):
        x, codebook = (torch.randn(*s, dim, generator=g, dtype=dtype) for s in ((*groups, rows), (size,)))
        mask = torch.rand(*groups, rows, generator=g) < 0.8
        x[..., 1, 0] = torch.nan
        x[..., 2, :] = codebook[-1]
        expected_inputs, inputs = leaves(x, codebook, dtype=torch.float64), leaves(x, codebook)
        expected = dense(*expected_inputs, metric, scale, floor, mask)
        loss(*expected).backward()
        with fastvq.use_backend(backend):
            actual = fastvq.soft_assign(*inputs, metric=metric, scale=scale, floor=floor, mask=mask)
            loss(*actual).backward()
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other.to(dtype), rtol=RELATIVE[dtype], atol=10 * TOLERANCE[dtype]["atol"])
        for one, other in zip(inputs, expected_inputs, strict=True):
            assert one.grad.dtype == dtype
            assert (one.grad - other.grad).abs().max() <= other.grad.abs().max() * RELATIVE[dtype] + 1e-12


@pytest.mark.parametrize("metric", ["distance", "l2"])
def test_an_offset_costs_no_accuracy(metric, backend):
    x, codebook = (torch.randn(s, 8, generator=generator(s)) for s in (60, 40))
    x, codebook = (256 * x).round() / 256, (256 * codebook).round() / 256  # exact beside 1000 too
    with fastvq.use_backend(backend):
        near, far = (fastvq.soft_assign(x + shift, codebook + shift, metric=metric) for shift in (0, 1000))
    for one, other in zip(near, far, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_small_distances_are_not_lost(backend):
    """|x|^2 + |e|^2 - 2 <x, e> has an error of 1e-7 |x|^2, thousands of times the distances here."""
    codebook = torch.randn(20, 64, generator=generator())
    x = codebook + 1e-5 * torch.randn(20, 64, generator=generator(1))
    with fastvq.use_backend(backend):
        actual = fastvq.cross_entropy(x, codebook, torch.arange(20), scale=1e4)
        squares = fastvq.soft_assign(x, codebook, metric="l2", scale=1e9).logsumexp
    distances = dense_scores(x.double(), codebook.double(), "distance").diagonal()
    torch.testing.assert_close(squares, (-1e9 * distances.square()).float(), rtol=1e-5, atol=0)
    assert abs(actual) < 1e-5


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric, backend):
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
    """As VectorQuantize's codebook diversity has it: the mean over the batch alone, its entropy with a floor."""
    monkeypatch.setattr(sys.modules["fastvq.functional.soft_assign"], "LARGEST_MEAN", budget)
    x, codebook = torch.randn(6, 11, 5, generator=generator()), torch.randn(23, 5, generator=generator(1))
    inputs, wide = leaves(x, codebook), leaves(x, codebook, dtype=torch.float64)
    mean = (4.0 * dense_scores(*wide, metric)).softmax(-1).mean(0)
    expected = -(mean * mean.clamp_min(1e-3).log()).sum(-1).mean()
    with fastvq.use_backend(backend):
        actual = fastvq.mean_assignment_entropy(*inputs, metric=metric, scale=4.0, floor=1e-3)
        actual.backward()
        kept = torch.ones(6, 11, dtype=torch.bool)
        kept[2], kept[:, 5] = False, False
        masked = fastvq.mean_assignment_entropy(x, codebook, metric=metric, scale=4.0, floor=1e-3, mask=kept)
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


def test_codes_and_rows_that_are_not_finite(backend, small_tiles):
    """One bad code has probability 0, one bad row no part; with no good code nothing counts."""
    x, codebook = torch.randn(20, 4, generator=generator()), torch.randn(30, 4, generator=generator())
    good_rows, good_codes = torch.rand(20, generator=generator()) < 0.8, torch.rand(30, generator=generator()) < 0.8
    bad_x, bad_codes = x.masked_fill(~good_rows[:, None], torch.nan), codebook.clone()
    bad_codes[~good_codes, 2] = torch.inf
    with fastvq.use_backend(backend):
        for metric in METRICS:
            inputs, clean = leaves(bad_x, bad_codes), leaves(x[good_rows], codebook[good_codes])
            actual, expected = (fastvq.soft_assign(*pair, metric=metric) for pair in (inputs, clean))
            loss(*actual[:2], actual.mean[good_codes]).backward()
            weights = torch.linspace(0.5, 1.5, 20)[good_rows], torch.linspace(0.5, 1.5, 20).flip(0)[good_rows]
            mean_part = (expected.mean * (expected.mean + 0.01).log()).sum()
            ((expected.entropy * weights[0]).sum() + (expected.logsumexp * weights[1]).sum() - mean_part).backward()
            torch.testing.assert_close(actual.mean[good_codes], expected.mean)
            assert not actual.mean[~good_codes].any()
            torch.testing.assert_close(inputs[0].grad[good_rows], clean[0].grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(inputs[1].grad[good_codes], clean[1].grad, rtol=1e-4, atol=1e-5)
            assert not inputs[0].grad[~good_rows].any()
            assert not inputs[1].grad[~good_codes].any()
            nothing = fastvq.soft_assign(x, torch.full_like(codebook, torch.inf), metric=metric)
            assert not any(result.any() for result in nothing)
            empty = fastvq.soft_assign(x[:0], codebook, metric=metric)
            assert empty.logsumexp.shape == (0,)
            assert not empty.mean.any()


def test_a_codebook_may_learn_before_the_backward(backend):
    x, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(6, 4)
    with fastvq.use_backend(backend):
        expected = torch.autograd.grad(fastvq.cross_entropy(x, codebook, torch.arange(9) % 6), x)[0]
        result = fastvq.cross_entropy(x, codebook, torch.arange(9) % 6)
        codebook.mul_(2)
        assert torch.equal(torch.autograd.grad(result, x)[0], expected)


def test_autocast_changes_nothing(backend):
    x, codebook = leaves(torch.randn(50, 8), torch.randn(20, 8))
    with fastvq.use_backend(backend):
        grads = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                grads.append(torch.autograd.grad(loss(*fastvq.soft_assign(x, codebook)), (x, codebook)))
    assert all(map(torch.equal, *grads))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosine"}, "metric: must be one of distance, l2, dot, got 'cosine'"),
        ({"scale": 0.0}, "scale: must be positive, got 0.0"),
        ({"floor": 1.0}, r"floor: must lie in \[0, 1\), got 1.0"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "mask: must have shape"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fastvq.soft_assign(torch.zeros(3, 2), torch.zeros(4, 2), **options)
