"""Tables of codes, shared, for each row, and implicit, give the same results."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.parts import tables
from fastvq.parts.tables import Implicit, NeuralCodes, PerRow, Shared

from ..cases import close, generator

C, R, K, D = 1, 40, 12, 5


def make(kind, metric="l2"):
    """Return a table and all its codes as (C, R, K, D)."""
    torch.manual_seed(0)
    codes = torch.randn(C, K, D)
    if kind == "shared":
        return Shared(codes, metric), codes[:, None].expand(C, R, K, D)
    if kind == "per row":
        codes = torch.randn(C, R, K, D)
        return PerRow(codes, metric), codes
    network, condition = NeuralCodes(D, depth=2), torch.randn(C, R, D)
    return Implicit(codes, network, condition, metric), network(codes[:, None], condition=condition[:, :, None])


def rows():
    x = torch.randn(C, R, D, generator=generator(5))
    x[0, 3, 1] = torch.nan
    return x


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("kind", ["shared", "per row", "implicit"])
def test_nearest_and_lookup(kind, metric, monkeypatch):
    monkeypatch.setattr("fastvq.parts.tables.CHUNK_ELEMENTS", 7 * K * D)  # several chunks
    table, codes = make(kind, metric)
    x, mask = rows(), torch.rand(C, R, generator=generator()) < 0.8
    expected = reference.topk_search(x[0][:, None], codes[0].detach(), 4, metric=metric)[None, :, 0]
    assert torch.equal(table.nearest(x, None), expected[..., 0])
    assert torch.equal(table.nearest_k(x, 4, None), expected)
    for found in (table.nearest(x, mask), table.nearest_k(x, 4, mask)[..., 0]):
        assert torch.equal(found, expected[..., 0].masked_fill(~mask, -1))
    looked = table.lookup(expected)
    picked = codes.gather(2, expected.clamp_min(0)[..., None].expand(-1, -1, -1, D))
    close(looked, picked.masked_fill((expected < 0)[..., None], 0))


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("kind", ["shared", "per row", "implicit"])
def test_cross_entropy_and_its_gradient(kind, metric, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK_ELEMENTS", 7 * K * D)
    table, codes = make(kind, metric)
    targets = torch.randint(-1, K, (C, R), generator=generator())
    x = rows().requires_grad_()
    loss = table.cross_entropy(x, targets)
    loss.backward()
    counted = (targets >= 0) & x.isfinite().all(-1)
    y = x.detach()[counted].requires_grad_()
    own = codes[counted]
    logits = (y[:, None] * own).sum(-1) if metric == "dot" else -(y[:, None] - own).norm(dim=-1)
    expected = torch.nn.functional.cross_entropy(logits, targets[counted])
    expected.backward()
    close(loss.detach(), expected.detach())
    torch.testing.assert_close(x.grad[counted], y.grad, rtol=1e-4, atol=1e-6)
    assert not x.grad[~counted].any()


@pytest.mark.parametrize("kind", ["shared", "per row"])
def test_positional_entropy(kind):
    table, codes = make(kind)
    x, mask = rows(), torch.rand(C, R, generator=generator()) < 0.8
    x.requires_grad_()
    value = table.positional_entropy(x, (4, 10), 3.0, mask)
    counted = (mask & x.isfinite().all(-1)).view(4, 10, 1)
    distance = (x.nan_to_num().view(4, 10, 1, D) - codes.view(4, 10, K, D)).norm(dim=-1)
    p = (-3 * distance).softmax(-1)
    mean = (p * counted).sum(0) / counted.sum(0).clamp_min(1)
    close(value.detach(), -(mean * mean.clamp_min(1e-5).log()).sum(-1).mean().detach())
    value.backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("kind", ["shared", "per row", "implicit"])
def test_draws(kind, metric):
    table, codes = make(kind, metric)
    x = rows()
    distance = (x[0, :, None] - codes[0]).norm(dim=-1) if metric == "l2" else -(x[0, :, None] * codes[0]).sum(-1)
    p = (-distance / 0.7).softmax(-1).nan_to_num()
    torch.manual_seed(3)
    counts = torch.zeros(R, K)
    for _ in range(300):
        drawn = table.draw(x, 0.7, None, None)[0]
        counts[torch.arange(R), drawn.clamp_min(0)] += (drawn >= 0).float()
    assert (counts / 300 - p).abs().max() < 0.15
    assert (counts[3] == 0).all()
    several = table.draw(x, 0.7, K, None)[0]
    assert several[0].sort().values.tolist() == list(range(K))  # without repetition
    assert (several[3] == -1).all()
    mask = torch.zeros(C, R, dtype=torch.bool)
    assert (table.draw(x, 0.7, 2, mask) == -1).all()
    assert (table.draw(x, 0.7, None, mask) == -1).all()


def test_an_implicit_codebook_has_no_positional_entropy():
    with pytest.raises(ValueError, match="codebook_diversity_loss_weight: must be 0"):
        make("implicit")[0].positional_entropy(rows(), (4, 10), 1.0, None)
