"""Semantic IDs: which items collide, and IDs that don't."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastvq.parts import collisions, unique_ids

from ..cases import generator


def test_a_report_of_collisions():
    report = collisions(torch.tensor([[0, 1], [2, 1], [0, 1], [0, 1], [2, 2], [2, 1]]))
    assert (report.distinct, report.items, report.largest) == (3, 5, 3)
    assert report.groups.tolist() == [0, 1, 0, 0, 2, 1]
    assert collisions(torch.zeros(0, 2, dtype=torch.int64))[1:] == (0, 0, 0)


def test_each_item_takes_the_nearest_free_path():
    x = 0.2 * torch.randn(40, 3, generator=generator())
    codebooks = [torch.randn(4, 3, generator=generator(1)), 0.5 * torch.randn(16, 3, generator=generator(2))]
    found = unique_ids(x, codebooks, beam=64)
    assert collisions(found.indices).items == 0
    paths = list(itertools.product(range(4), range(16)))
    errors = torch.stack([(x - codebooks[0][a] - codebooks[1][b]).square().sum(1) for a, b in paths], 1)
    own = errors.gather(1, torch.tensor([[paths.index(tuple(row))] for row in found.indices.tolist()]))
    greedy = unique_ids(x[:1], codebooks).indices
    assert not unique_ids(x[:1], codebooks).moved.any()
    assert greedy.shape == (1, 2)
    used = set(map(tuple, found.indices.tolist()))
    free = [place for place, path in enumerate(paths) if path not in used]
    assert found.moved.any()
    assert (own[found.moved] <= errors[found.moved][:, free].amin(1, keepdim=True) + 1e-6).all()


def test_as_many_items_as_ids_and_a_beam_that_grows():
    codebooks = [torch.randn(4, 2, generator=generator()), torch.randn(4, 2, generator=generator(1))]
    found = unique_ids(torch.zeros(16, 2), codebooks, beam=1)
    assert collisions(found.indices).distinct == 16
    assert int(found.moved.sum()) == 15
    given = torch.zeros(16, 2, dtype=torch.int64)
    assert collisions(unique_ids(torch.zeros(16, 2), codebooks, given).indices).distinct == 16


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(17, 2), {}, "codebooks: have 16 IDs, fewer than the 17 items"),
        (torch.full((3, 2), torch.nan), {}, "x: must be finite"),
        (torch.zeros(16, 2), {"most": 4}, "most: 12 items have no free ID among their 4 best"),
        (torch.zeros(3, 2), {"indices": torch.zeros(3, 1).long()}, "indices: must have shape"),
        (torch.zeros(3, 2), {"beam": 0}, "beam: must be"),
    ],
)
def test_refuses_by_name(x, options, message):
    codebooks = [torch.randn(4, 2, generator=generator()), torch.randn(4, 2, generator=generator(1))]
    with pytest.raises(ValueError, match=f"^{message}"):
        unique_ids(x, codebooks, **options)


@pytest.mark.parametrize(
    ("count", "stages", "indices", "message"),
    [
        (3, 2, torch.full((3, 2), -1), "indices: must have a code of every stage, got -1"),
        (3, 2, torch.full((3, 2), 4), "indices: "),
        (1, 0, None, "codebooks: must be at least one"),
    ],
)
def test_ids_that_cannot_be(count, stages, indices, message):
    with pytest.raises((ValueError, IndexError), match=message):
        unique_ids(torch.randn(count, 8), [torch.randn(4, 8)] * stages, indices)


def test_no_items_have_no_ids():
    assert unique_ids(torch.zeros(0, 8), [torch.randn(4, 8)] * 2).indices.shape == (0, 2)
