"""The parts of codebook learning, one by one; tests/test_vector_quantize.py has them together."""

from __future__ import annotations

import math

import pytest
import torch

from fastvq import reference
from fastvq.codebook import Codebook, kmeans, sample_rows
from fastvq.functional import unit_norm

from .cases import close


@pytest.mark.parametrize(("rows", "valid", "count"), [(10, 10, 10), (10, 6, 4), (50, 20, 7), (1, 1, 1)])
def test_sampled_rows_are_valid_and_distinct(rows, valid, count):
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.randperm(rows)[:valid]] = True
    chosen, available = sample_rows(torch.zeros(rows, 2), mask, count)
    assert available == valid
    assert bool(mask[chosen].all())
    assert len(chosen.unique()) == count


def test_sampled_rows_repeat_where_too_few():
    mask = torch.tensor([False, True, False, True, True])
    chosen, available = sample_rows(torch.zeros(5, 2), mask, 8)
    assert available == 3
    assert sorted(chosen.bincount(minlength=5).tolist()) == [0, 0, 2, 3, 3]


def test_sampled_rows_are_random():
    mask = torch.ones(100, dtype=torch.bool)
    assert not torch.equal(sample_rows(torch.zeros(100, 1), mask, 9)[0], sample_rows(torch.zeros(100, 1), mask, 9)[0])


def lloyd(x, means, iterations, metric):
    """Row by row and code by code."""
    for _ in range(iterations):
        indices = reference.search(x, means, metric=metric)
        new = means.clone()
        for k in range(len(means)):
            members = x[indices == k].double()
            if len(members):
                new[k] = members.mean(0).float()
                new[k] = unit_norm(new[k]) if metric == "dot" else new[k]
        means = new
    return means, torch.bincount(indices, minlength=len(means)).float()


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_kmeans_is_lloyds_algorithm(metric, monkeypatch):
    x = torch.randn(200, 5)
    x = unit_norm(x) if metric == "dot" else x
    monkeypatch.setattr("fastvq.codebook.sample_rows", lambda x, valid, count: (torch.arange(count), valid.sum()))
    valid = torch.ones(200, dtype=torch.bool)
    means, counts = kmeans(x, 9, iterations=4, valid=valid, metric=metric)
    expected, expected_counts = lloyd(x, x[:9], 4, metric)
    close(means, expected)
    assert torch.equal(counts, expected_counts)


def test_kmeans_finds_separated_clusters():
    centres = 100 * torch.eye(4)
    x = (centres[:, None] + torch.randn(4, 50, 4)).flatten(0, 1)
    torch.manual_seed(3)
    means, counts = kmeans(x, 16, iterations=20, valid=torch.ones(200, dtype=torch.bool))
    assert counts.sum() == 200
    nearest = reference.search(x, means)
    assert (x - means[nearest]).square().sum(1).mean() < 8


def test_kmeans_ignores_what_is_not_valid():
    x = torch.randn(60, 3)
    valid = torch.rand(60) < 0.5
    x[~valid] = torch.nan
    means, counts = kmeans(x, 5, iterations=3, valid=valid)
    assert bool(means.isfinite().all())
    assert counts.sum() == valid.sum()


def test_kmeans_with_fewer_rows_than_codes():
    x = torch.randn(3, 2)
    means, counts = kmeans(x, 8, iterations=2, valid=torch.ones(3, dtype=torch.bool))
    assert {tuple(m) for m in means.tolist()} == {tuple(row) for row in x.tolist()}
    assert counts.sum() == 3


def test_kmeans_without_a_valid_row_stays_finite():
    means, counts = kmeans(torch.full((4, 2), torch.nan), 3, iterations=2, valid=torch.zeros(4, dtype=torch.bool))
    assert not means.any()
    assert not counts.any()


def revive(codebook, x, valid=None):
    codebook._revive_(x, torch.ones(len(x), dtype=torch.bool) if valid is None else valid)


def test_dead_codes_become_distinct_rows():
    codebook = Codebook(4, 10, dead_code_threshold=2.0)
    dead = torch.tensor([1, 4, 5, 9])
    codebook.cluster_size[:] = 3.0
    codebook.cluster_size[0, dead] = torch.tensor([0.0, 1.9, 1e-30, 1.0])
    before = codebook.embed[0].clone(), codebook.embed_avg[0].clone()
    x = torch.randn(20, 4)
    revive(codebook, x)
    rows = [(x == code).all(1).nonzero().item() for code in codebook.embed[0, dead]]
    assert len(set(rows)) == 4
    assert torch.equal(codebook.cluster_size[0, dead], torch.full((4,), 2.0))
    assert torch.equal(codebook.embed_avg[0, dead], 2 * codebook.embed[0, dead])
    alive = torch.ones(10, dtype=torch.bool).index_fill(0, dead, False)
    assert torch.equal(codebook.embed[0, alive], before[0][alive])
    assert torch.equal(codebook.embed_avg[0, alive], before[1][alive])
    assert bool((codebook.cluster_size[0, alive] == 3).all())


def test_more_dead_codes_than_rows():
    """As many as there are rows are revived, the others wait."""
    codebook = Codebook(4, 10, dead_code_threshold=2.0)
    before = codebook.embed[0].clone()
    x = torch.randn(6, 4)
    valid = torch.tensor([True, False, True, True, False, False])
    x[~valid] = torch.nan
    revive(codebook, x, valid)
    revived = (codebook.embed[0] != before).any(1)
    assert revived.sum() == 3
    assert {tuple(c) for c in codebook.embed[0, revived].tolist()} == {tuple(row) for row in x[valid].tolist()}
    assert torch.equal(codebook.cluster_size[0] == 2, revived)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_to_revive_from(rows):
    codebook = Codebook(4, 10, dead_code_threshold=2.0)
    before = {name: t.clone() for name, t in codebook.state_dict().items()}
    revive(codebook, torch.full((rows, 4), torch.nan), torch.zeros(rows, dtype=torch.bool))
    for name, t in codebook.state_dict().items():
        assert torch.equal(t, before[name])


def test_initial_codes_are_hes_uniform():
    codebook = Codebook(16, 512).embed
    limit = math.sqrt(6 / (16 * 512))
    assert codebook.abs().max() <= limit
    assert 0.99 * limit < codebook.abs().max()
    close(codebook.std(), torch.tensor(limit / math.sqrt(3)), torch.bfloat16)
    close(Codebook(16, 8, cosine=True).embed.norm(dim=-1), torch.ones(1, 8))
    assert not Codebook(16, 8, kmeans_init=True).embed.any()


def test_more_than_one_process_is_refused(monkeypatch):
    """Every rank would drift to a codebook of its own."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *a: 2)
    codebook = Codebook(2, 4)
    with pytest.raises(RuntimeError, match="synchronised across processes"):
        codebook.learn_(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_that_are_set_stay(cosine):
    """Averages that agree keep them where they are, and k-means doesn't take their place."""
    codebook = Codebook(4, 8, kmeans_init=True, cosine=cosine, decay=0.99)
    codes = 5 * torch.randn(8, 4)
    codebook.set_(codes)
    codes = unit_norm(codes) if cosine else codes
    codebook.initialise_(torch.randn(20, 4), None)
    codebook.learn_(torch.zeros(3, 4), torch.full((3,), -1))
    torch.testing.assert_close(codebook.codes, codes, rtol=1e-4, atol=1e-5)  # the smoothing's eps moves them a little


def test_state_written_behind_its_back_is_kept():
    """Some loaders copy into the buffers themselves."""
    trained, fresh = Codebook(4, 8), Codebook(4, 8, kmeans_init=True)
    for target, source in zip(fresh.buffers(), trained.buffers(), strict=True):
        target.copy_(source)
    fresh.initialise_(torch.randn(20, 4), None)
    assert torch.equal(fresh.codes, trained.codes)


def test_loading_in_place_of_meta_and_half_state():
    state = {name: t.half() if t.is_floating_point() else t for name, t in Codebook(4, 8).state_dict().items()}
    with torch.device("meta"):
        codebook = Codebook(4, 8)
        codebook.load_state_dict({}, strict=False)
    codebook.load_state_dict(state, assign=True)
    assert all(t.device.type == "cpu" for t in codebook.buffers())
    assert {t.dtype for t in codebook.buffers() if t.is_floating_point()} == {torch.float32}


def test_sizes_follow_the_use_without_moving_averages():
    """As beside a learnable codebook, where revival has nothing else to go by."""
    codebook = Codebook(4, 3, decay=0.5, ema_update=False, dead_code_threshold=0.3)
    before, x = codebook.codes.clone(), torch.randn(2, 4)
    for _ in range(2):  # the sizes of the unused codes: 1/2, then 1/4
        codebook.learn_(x, torch.tensor([1, 1]))
    assert torch.equal(codebook.codes[1], before[1])
    assert {tuple(code) for code in codebook.codes[[0, 2]].tolist()} == {tuple(row) for row in x.tolist()}
