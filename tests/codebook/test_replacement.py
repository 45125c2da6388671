"""The replacement of dead codes: which, by what, and when."""

from __future__ import annotations

import math

import pytest
import torch

from fastvq import distributed
from fastvq.backends import reference
from fastvq.codebook import Codebook, Replacement
from fastvq.codebook.candidates import nearest_rows

from ..cases import close, generator


def replace(codebook, x, mask=None):
    codebook.replace_dead_(x[None], (torch.ones(len(x), dtype=torch.bool) if mask is None else mask)[None])


def test_dead_codes_become_distinct_rows():
    codebook = Codebook(4, 10, replacement=Replacement(2.0))
    dead = torch.tensor([1, 4, 5, 9])
    codebook.cluster_size[:] = 3.0
    codebook.cluster_size[0, dead] = torch.tensor([0.0, 1.9, 1e-30, 1.0])
    before = codebook.embed[0].clone(), codebook.embed_avg[0].clone()
    x = torch.randn(20, 4)
    replace(codebook, x)
    rows = [(x == code).all(1).nonzero().item() for code in codebook.embed[0, dead]]
    assert len(set(rows)) == 4
    assert torch.equal(codebook.cluster_size[0, dead], torch.full((4,), 2.0))
    assert torch.equal(codebook.embed_avg[0, dead], 2 * codebook.embed[0, dead])
    alive = torch.ones(10, dtype=torch.bool).index_fill(0, dead, False)
    assert torch.equal(codebook.embed[0, alive], before[0][alive])
    assert torch.equal(codebook.embed_avg[0, alive], before[1][alive])
    assert bool((codebook.cluster_size[0, alive] == 3).all())


def test_more_dead_codes_than_rows():
    """As many codes are replaced as there are rows; the others wait."""
    codebook = Codebook(4, 10, replacement=Replacement(2.0))
    before = codebook.embed[0].clone()
    x = torch.randn(6, 4)
    mask = torch.tensor([True, False, True, True, False, False])
    x[~mask] = torch.nan
    replace(codebook, x, mask)
    replaced = (codebook.embed[0] != before).any(1)
    assert replaced.sum() == 3
    assert {tuple(c) for c in codebook.embed[0, replaced].tolist()} == {tuple(row) for row in x[mask].tolist()}
    assert torch.equal(codebook.cluster_size[0] == 2, replaced)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_to_replace_by(rows):
    codebook = Codebook(4, 10, replacement=Replacement(2.0))
    before = {name: t.clone() for name, t in codebook.state_dict().items()}
    replace(codebook, torch.full((rows, 4), torch.nan), torch.zeros(rows, dtype=torch.bool))
    for name, t in codebook.state_dict().items():
        assert torch.equal(t, before[name])


def test_relative_threshold():
    """A tenth of what equal use would give, whatever the batch's size."""
    for scale in (1.0, 1000.0):
        codebook = Codebook(4, 4, replacement=Replacement(0.1, relative=True))
        codebook.cluster_size[0] = scale * torch.tensor([1.0, 1.0, 0.05, 0.06])  # the limit is 0.05275 of it
        before = codebook.embed[0].clone()
        replace(codebook, torch.randn(9, 4))
        assert (codebook.embed[0] != before).any(1).tolist() == [False, False, True, False]
        close(codebook.cluster_size[0, 2], torch.tensor(scale * 0.05275))


def test_every_so_many_steps():
    codebook = Codebook(4, 4, replacement=Replacement(2.0, every=3), ema_update=False, decay=1.0)
    changed = []
    for _ in range(7):
        codebook.cluster_size.zero_()
        before = codebook.embed.clone()
        codebook.learn_(torch.randn(1, 9, 4), torch.zeros(1, 9, dtype=torch.int64))
        changed.append(not torch.equal(before, codebook.embed))
    assert changed == [False, False, True, False, False, True, False]


def test_at_once_and_size():
    codebook = Codebook(4, 10, replacement=Replacement(2.0, at_once=3, size=7.0))
    before = codebook.embed[0].clone()
    codebook.cluster_size.zero_()
    replace(codebook, torch.randn(20, 4))
    assert (codebook.embed[0] != before).any(1).tolist() == [True] * 3 + [False] * 7
    assert codebook.cluster_size[0].tolist() == [7.0] * 3 + [0.0] * 7


def test_a_relative_size_is_a_multiple_of_the_mean():
    """As Mimi's replaced_usage_ratio: a code begins with the mean cluster size, ten times the limit."""
    codebook = Codebook(4, 4, replacement=Replacement(0.1, relative=True, size=1.0))
    codebook.cluster_size[0] = torch.tensor([1.0, 1.0, 0.05, 0.06])
    replace(codebook, torch.randn(9, 4))
    close(codebook.cluster_size[0], torch.tensor([1.0, 1.0, 0.5275, 0.06]))
    close(codebook.embed_avg[0, 2], 0.5275 * codebook.embed[0, 2])


def test_replacement_before_the_averages_move():
    """A code that was dead is replaced although this batch revives it, and its average then moves from the new one."""
    codebook = Codebook(4, 2, decay=0.5, eps=0.0, replacement=Replacement(1.0, size=3.0, before_update=True))
    codebook.cluster_size[0] = torch.tensor([0.5, 4.0])
    row = torch.randn(4)
    codebook.learn_(row.expand(1, 8, 4), torch.zeros(1, 8, dtype=torch.int64))
    close(codebook.cluster_size[0], torch.tensor([0.5 * 3 + 0.5 * 8, 2.0]))
    close(codebook.embed[0, 0], row)
    later = Codebook(4, 2, decay=0.5, eps=0.0, replacement=Replacement(1.0, size=3.0))
    later.cluster_size[0] = torch.tensor([0.5, 4.0])
    later.learn_(row.expand(1, 8, 4), torch.zeros(1, 8, dtype=torch.int64))
    close(later.cluster_size[0], torch.tensor([0.5 * 0.5 + 0.5 * 8, 2.0]))  # no longer dead


def test_replacement_that_keeps_the_averages():
    """As in Jukebox: the code is replaced at each step until its old average is large enough again."""
    codebook = Codebook(4, 2, decay=0.5, eps=0.0, replacement=Replacement(1.0, keep_averages=True))
    codebook.cluster_size[0] = torch.tensor([0.5, 4.0])
    average, x = codebook.embed_avg[0, 0].clone(), torch.randn(8, 4)
    codebook.learn_(x[None], torch.ones(1, 8, dtype=torch.int64))
    assert (x == codebook.embed[0, 0]).all(1).any()
    close(codebook.cluster_size[0], torch.tensor([0.25, 6.0]))
    close(codebook.embed_avg[0, 0], 0.5 * average)
    codebook.learn_(x[None], torch.zeros(1, 8, dtype=torch.int64))
    close(codebook.embed[0, 0], (0.25 * average + 0.5 * x.sum(0)) / 4.125)


@pytest.mark.parametrize("rows", ["nearest", "random", "kmeans++"])
def test_codes_move_to_their_anchors_the_less_they_are_used(rows):
    codebook = Codebook(4, 10, decay=0.9, replacement=Replacement(anchors=True, rows=rows))
    codebook.cluster_size[0] = torch.tensor([0.0, 1e-3, 1e-2, 0.1, 1, 2, 3, 4, 5, 6])
    codes, averages = codebook.embed[0].clone(), codebook.embed_avg[0].clone()
    sizes = codebook.cluster_size[0].clone()
    x = torch.randn(30, 4, generator=generator(1))
    x[3] = torch.nan
    replace(codebook, x, x.isfinite().all(1))
    share = sizes / sizes.sum()
    a = torch.exp(-10 * 10 * share / (1 - 0.9) - 1e-3)[:, None]
    if rows == "nearest":
        anchors = x[torch.cdist(codes, x.nan_to_num(1e6)).argmin(1)]
        close(codebook.embed[0], (1 - a) * codes + a * anchors)
    moved = codebook.embed[0] - codes
    assert torch.equal(moved.any(1), a[:, 0] > 1e-20)
    close(codebook.embed_avg[0], averages + moved * sizes[:, None])
    assert torch.equal(codebook.cluster_size[0], sizes)
    before = codebook.embed.clone()
    replace(codebook, x, torch.zeros(30, dtype=torch.bool))
    assert torch.equal(codebook.embed, before)


def test_a_broken_code_moves_to_its_anchor_as_well():
    codebook = Codebook(4, 3, replacement=Replacement(anchors=True, rows="nearest"))
    codebook.cluster_size[0] = torch.tensor([0.0, 2.0, 2.0])
    codebook.embed[0, 0] = torch.nan
    x = torch.randn(30, 4, generator=generator(1))
    replace(codebook, x, torch.ones(30, dtype=torch.bool))
    close(codebook.embed[0, 0], math.exp(-1e-3) * x[x.square().sum(1).argmin()])
    assert codebook.embed_avg.isfinite().all()


def test_each_rank_gives_the_anchors_of_its_share_of_the_codes(monkeypatch):
    codes, found = torch.randn(7, 4, generator=generator()), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        x = torch.randn(9, 4, generator=generator(rank))
        rows, filled = nearest_rows(x, torch.ones(9, dtype=torch.bool), codes, "l2", together=True)
        own = filled > 0
        assert torch.equal(rows[own], x[torch.cdist(codes, x).argmin(1)][own])
        assert not rows[~own].any()
        found.append(filled)
    assert torch.equal(sum(found), torch.ones(7))


def test_anchors_of_learnable_unit_codes():
    codebook = Codebook(
        4, 10, cosine=True, learnable=True, ema_update=False, replacement=Replacement(0.0, anchors=True)
    )
    codebook.cluster_size.zero_()
    before = codebook.embed.detach().clone()
    replace(codebook, torch.nn.functional.normalize(torch.randn(30, 4), dim=1))
    close(codebook.embed.detach().norm(dim=2), torch.ones(1, 10))
    assert (codebook.embed != before).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "nearest"}, "rows: must be 'random' or 'kmeans\\+\\+' without anchors=True"),
        ({"anchors": True, "keep_averages": True}, "anchors: must be False beside keep_averages"),
        ({"anchors": True, "at_once": 2}, "anchors: must be False beside at_once"),
        ({"anchors": True, "before_update": True}, "anchors: must be False beside before_update"),
        ({"anchors": True, "every": 2}, "anchors: must be False beside every"),
        ({"anchors": True, "relative": True}, "anchors: must be False beside relative"),
        ({"anchors": True, "size": 0.5}, "anchors: must be False beside size"),
    ],
)
def test_anchors_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Replacement(**settings)


def test_kept_averages_take_no_size():
    with pytest.raises(ValueError, match=r"^keep_averages: must be False beside size"):
        Replacement(2.0, keep_averages=True, size=1.0)


def test_replacement_by_rows_of_earlier_batches():
    codebook = Codebook(4, 6, replacement=Replacement(2.0, reservoir=64))
    codebook.cluster_size.fill_(5.0)
    earlier = torch.randn(50, 4)
    replace(codebook, earlier)
    codebook.cluster_size.zero_()
    replace(codebook, torch.zeros(1, 4))
    known = {tuple(row) for row in earlier.tolist()} | {(0.0,) * 4}
    assert {tuple(code) for code in codebook.embed[0].tolist()} <= known
    assert len(codebook.embed[0].unique(dim=0)) == 6


def test_kmeans_pp_replacement_covers_the_data_faster():
    """Codes all in one of 8 clusters of very different sizes: after one replacement every cluster has one."""
    g = generator(1)
    centers = 20 * torch.eye(8)
    sizes = torch.tensor([2000, 3, 3, 3, 3, 3, 3, 3])
    x = torch.cat([c + 0.1 * torch.randn(int(n), 8, generator=g) for c, n in zip(centers, sizes, strict=True)])
    covered = {}
    for rows in ("random", "kmeans++"):
        codebook = Codebook(8, 16, replacement=Replacement(2.0, rows=rows))
        codebook.embed[0] = centers[0] + 0.1 * torch.randn(16, 8, generator=g)
        codebook.cluster_size.zero_()
        codebook.cluster_size[0, 0] = 100.0
        replace(codebook, x)
        covered[rows] = len(reference.search(codebook.embed[0], centers).unique())
    assert covered["kmeans++"] == 8
    assert covered["random"] < 5


def test_each_head_takes_its_own_rows():
    codebook = Codebook(2, 3, heads=2, replacement=Replacement(2.0, reservoir=16))
    codebook.cluster_size.zero_()
    x = torch.stack([torch.full((9, 2), 1.0), torch.full((9, 2), 2.0)])
    codebook.replace_dead_(x, torch.ones(2, 9, dtype=torch.bool))
    assert codebook.embed[0].unique().tolist() == [1.0]
    assert codebook.embed[1].unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", -1), ("every", 0), ("rows", "far"), ("reservoir", -1), ("at_once", 0), ("size", 0.0)],
)
def test_policies_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"^{name}: must"):
        Replacement(**{name: value})


def test_sizes_follow_the_use_without_moving_averages():
    """As for a learnable codebook, where replacement depends on nothing else."""
    codebook = Codebook(4, 3, decay=0.5, ema_update=False, replacement=Replacement(0.3))
    before, x = codebook.embed[0].clone(), torch.randn(2, 4)
    for _ in range(2):  # the sizes of the unused codes: 1/2, then 1/4
        codebook.learn_(x[None], torch.tensor([[1, 1]]))
    assert torch.equal(codebook.embed[0, 1], before[1])
    assert {tuple(code) for code in codebook.embed[0, [0, 2]].tolist()} == {tuple(row) for row in x.tolist()}
