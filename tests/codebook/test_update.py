"""The tensor functions of a learning step, beside loops over codebooks and heads."""

from __future__ import annotations

import pytest
import torch

from fastvq import accumulate, ema_update_
from fastvq.codebook.update import batch_statistics, ema_step_, flat_indices

from ..cases import generator

D = 4
SHAPES = {
    "one": [(1, 7)],
    "heads": [(3, 7)],
    "stages": [(1, 7)] * 4,
    "stages of heads": [(2, 7)] * 3,
    "sizes": [(1, 7), (2, 3), (1, 5)],
}


def batch(shapes, n=20, stacked=False):
    g = generator()
    x = [torch.randn(heads, n, D, generator=g) for heads, _ in shapes]
    indices = [torch.randint(-1, size, (heads, n), generator=g) for heads, size in shapes]
    return (torch.stack(x), torch.stack(indices)) if stacked else (x, indices)


@pytest.mark.parametrize(
    ("kind", "stacked"),
    [(kind, stacked) for kind in SHAPES for stacked in (False, True) if kind != "sizes" or not stacked],
)
def test_statistics_are_those_of_each_head(kind, stacked):
    shapes = SHAPES[kind]
    x, indices = batch(shapes, stacked=stacked)
    counts, sums = batch_statistics(x, indices, shapes)
    assert len(counts) == len(sums) == len(shapes)
    for place, (heads, size) in enumerate(shapes):
        assert counts[place].shape == (heads, size)
        assert sums[place].shape == (heads, size, D)
        for head in range(heads):
            count, total = accumulate(x[place][head], indices[place][head], size)
            assert torch.equal(counts[place][head], count)
            assert torch.equal(sums[place][head], total)


@pytest.mark.parametrize("stacked", [False, True])
def test_indices_are_offset_by_the_codes_before(stacked):
    shapes = [(2, 7)] * 3
    indices = batch(shapes, stacked=stacked)[1]
    flat = flat_indices(indices, shapes).view(6, -1)
    for head, chosen in enumerate(one for codebook in indices for one in codebook):
        assert torch.equal(flat[head], torch.where(chosen < 0, -1, chosen + 7 * head))


@pytest.mark.parametrize("weighted", [False, True])
def test_averages_move_head_by_head(weighted):
    g = generator()
    state = [torch.randn(2, 5, D, generator=g), torch.rand(2, 5, generator=g), torch.randn(2, 5, D, generator=g)]
    counts, sums = torch.rand(2, 5, generator=g), torch.randn(2, 5, D, generator=g)
    weight = torch.rand(2, 5, generator=g) if weighted else None
    expected = [t.clone() for t in state]
    ema_step_(*state, counts, sums, weight, decay=0.7, eps=1e-5)
    for head in range(2):
        own = None if weight is None else weight[head]
        ema_update_(*(t[head] for t in expected), counts[head], sums[head], decay=0.7, eps=1e-5, weight=own)
    for one, other in zip(state, expected, strict=True):
        assert torch.equal(one, other)
