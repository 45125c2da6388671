"""The op `soft_assign`, against the softmax over the N x K matrix."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import TOLERANCE, generator, require_support

METRICS = ("distance", "l2", "dot")
# R, K, D, scale, floor
CASES = [(5, 1, 1, 1.0, 0.0), (9, 7, 3, 2.0, 1e-2), (40, 50, 8, 0.5, 1e-5), (17, 33, 16, 3.0, 0.0)]

RELATIVE = {dtype: options["rtol"] for dtype, options in TOLERANCE.items()}


def dense_scores(x, codebook, metric):
    if metric == "dot":
        return x @ codebook.T
    squares = (x.unsqueeze(-2) - codebook).square().sum(-1)
    if metric == "l2":
        return -squares
    zero = squares == 0
    return -squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def dense(x, codebook, metric, scale, floor, mask):
    """Compute with torch's own operations on the rows that take part."""
    rows = mask & x.isfinite().all(-1)
    logits = scale * dense_scores(x.masked_fill(~rows[..., None], 0), codebook, metric)
    p = logits.softmax(-1) * rows[..., None]
    entropy = -(p * p.clamp_min(max(floor, 1e-300)).log()).sum(-1)
    mean = p.sum(-2) / rows.sum(-1, keepdim=True).clamp_min(1)
    return logits.logsumexp(-1) * rows, entropy, mean


def loss(logsumexp, entropy, mean):
    weight = torch.linspace(0.5, 1.5, entropy.shape[-1], dtype=entropy.dtype)
    return (logsumexp * weight.flip(0)).sum() + (entropy * weight).sum() - (mean * (mean + 0.01).log()).sum()


def leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "size", "dim", "scale", "floor"), CASES)
def test_equals_the_dense_softmax(rows, size, dim, scale, floor, dtype, metric, backend, small_tiles):
    require_support(backend, "soft_assign_forward", dtype)
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


def test_codes_and_rows_that_are_not_finite(backend, small_tiles):
    """A non-finite code has probability 0, a non-finite row is excluded; without a finite code all rows are."""
    x, codebook = torch.randn(20, 4, generator=generator()), torch.randn(30, 4, generator=generator())
    good_rows, good_codes = torch.rand(20, generator=generator()) < 0.8, torch.rand(30, generator=generator()) < 0.8
    dirty_x, dirty_codes = x.masked_fill(~good_rows[:, None], torch.nan), codebook.clone()
    dirty_codes[~good_codes, 2] = torch.inf
    with fastvq.use_backend(backend):
        for metric in METRICS:
            inputs, clean = leaves(dirty_x, dirty_codes), leaves(x[good_rows], codebook[good_codes])
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


def test_autocast_changes_nothing(backend):
    x, codebook = leaves(torch.randn(50, 8), torch.randn(20, 8))
    with fastvq.use_backend(backend):
        grads = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                grads.append(torch.autograd.grad(loss(*fastvq.soft_assign(x, codebook)), (x, codebook)))
    assert all(map(torch.equal, *grads))


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
