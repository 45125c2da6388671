"""Tables of codes, shared, for each row and implicit; the network of QINCo; index backpropagation."""

from __future__ import annotations

import pytest
import torch
from vector_quantize_pytorch.residual_vq import MLP

from fastvq.backends import reference
from fastvq.parts import tables
from fastvq.parts.tables import Implicit, NeuralCodes, PerRow, Shared, index_backpropagation

from ..cases import close, generator
from .test_losses import masked, scores, vectors

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
    row_mask = (targets >= 0) & x.isfinite().all(-1)
    y = x.detach()[row_mask].requires_grad_()
    own = codes[row_mask]
    logits = (y[:, None] * own).sum(-1) if metric == "dot" else -(y[:, None] - own).norm(dim=-1)
    expected = torch.nn.functional.cross_entropy(logits, targets[row_mask])
    expected.backward()
    close(loss.detach(), expected.detach())
    torch.testing.assert_close(x.grad[row_mask], y.grad, rtol=1e-4, atol=1e-6)
    assert not x.grad[~row_mask].any()


@pytest.mark.parametrize("kind", ["shared", "per row"])
def test_positional_entropy(kind):
    table, codes = make(kind)
    x, mask = rows(), torch.rand(C, R, generator=generator()) < 0.8
    x.requires_grad_()
    value = table.positional_entropy(x, (4, 10), 3.0, mask)
    row_mask = (mask & x.isfinite().all(-1)).view(4, 10, 1)
    distance = (x.nan_to_num().view(4, 10, 1, D) - codes.view(4, 10, K, D)).norm(dim=-1)
    p = (-3 * distance).softmax(-1)
    mean = (p * row_mask).sum(0) / row_mask.sum(0).clamp_min(1)
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


def test_the_network_is_the_peers():
    for options in ({}, {"dim_hidden": 9, "depth": 2}, {"l2norm_output": True}):
        theirs, ours = MLP(6, **options), NeuralCodes(6, **options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        codes, condition = torch.randn(7, 6, generator=generator()), torch.randn(2, 5, 6, generator=generator(1))
        close(ours(codes, condition=condition[:, :, None]), theirs(codes, condition=condition))


def test_chunks_cover_all_rows(monkeypatch):
    network, codes, condition = NeuralCodes(6), torch.randn(7, 6), torch.randn(23, 6)
    whole = network(codes, condition=condition[:, None])
    for elements in (1, 7 * 6 * 4, 10**9):
        monkeypatch.setattr("fastvq.parts.tables.CHUNK_ELEMENTS", elements)
        parts = list(network.by_rows(codes, condition))
        assert max(len(part) for _, part in parts) <= max(1, elements // 42)
        close(torch.cat([part for _, part in parts]), whole)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_index_backpropagation(metric):
    (x, mask, row_mask), codebook = masked(), vectors(17, 5, seed=1).requires_grad_()
    x.requires_grad_()
    upstream = vectors(3, 11, 5, seed=2)
    quantized, indices = index_backpropagation(x, codebook, metric=metric, scale=1.5, mask=mask)
    dense_x = x.detach().clone().requires_grad_()
    dense_codebook = codebook.detach().clone().requires_grad_()
    s = scores(dense_x[row_mask], dense_codebook, metric)
    p = (1.5 * s).softmax(-1)
    onehot = torch.nn.functional.one_hot(s.argmax(-1), 17)
    expected = (onehot + p - p.detach()) @ dense_codebook
    close(quantized[row_mask], expected)
    assert torch.equal(quantized[row_mask], codebook[s.argmax(-1)])
    assert torch.equal(indices[row_mask], s.argmax(-1))
    assert (indices[~row_mask] == -1).all()
    assert not quantized[~row_mask].any()
    (quantized * upstream).sum().backward()
    (expected * upstream[row_mask]).sum().backward()
    close(x.grad[row_mask], dense_x.grad[row_mask])
    close(codebook.grad, dense_codebook.grad)
    assert not x.grad[~row_mask].any()
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
