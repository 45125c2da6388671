"""Beam search, compared with exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastvq import residual_search, topk_search
from fastvq.parts.beam import beam_search

from ..cases import generator

N, K, D = 25, 4, 3


def stages_of(codebooks):
    def of(codes):
        def propose(residuals, totals, mask, k):
            indices = topk_search(residuals, codes, min(k, len(codes)), mask=mask)
            found = codes[indices.clamp_min(0)]
            return indices, found, (residuals[:, None].double() - found.double()).square().mean(-1)

        return propose

    return [of(codes) for codes in codebooks]


def data(stages=3):
    codebooks = torch.randn(stages, K, D, generator=generator())
    return torch.randn(N, D, generator=generator(1)), codebooks


def scores(x, codebooks, ways, weights):
    total = torch.zeros(len(x), len(ways), dtype=torch.float64)
    for place, way in enumerate(ways):
        residual = x
        for codes, index, weight in zip(codebooks, way, weights, strict=True):
            total[:, place] += weight * (residual.double() - codes[index].double()).square().mean(1)
            residual = residual - codes[index]
    return total


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.3, 2.0, 0.5)])
def test_enough_beams_find_the_best_path(weights):
    x, codebooks = data()
    ways = list(itertools.product(range(K), repeat=3))
    best = torch.tensor(ways)[scores(x, codebooks, ways, weights).argmin(1)]
    assert torch.equal(beam_search(x, stages_of(codebooks), K**2, weights=weights), best)


def test_one_beam_is_greedy():
    x, codebooks = data()
    assert torch.equal(beam_search(x, stages_of(codebooks), 1), residual_search(x, codebooks))


def test_more_beams_score_no_worse_on_average():
    x, codebooks = data(5)
    means = []
    for beams in (1, 2, 4, 16):
        found = beam_search(x, stages_of(codebooks), beams)
        each = [scores(x[i : i + 1], codebooks, [found[i].tolist()], [1.0] * 5) for i in range(N)]
        means.append(torch.stack(each).mean().item())
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1]


def test_non_finite_and_masked_rows(monkeypatch):
    x, codebooks = data()
    mask = torch.rand(N, generator=generator(2)) < 0.7
    expected = beam_search(x, stages_of(codebooks), 3)
    dirty = x.clone()
    dirty[0, 1], mask[0] = torch.nan, True
    monkeypatch.setattr("fastvq.parts.beam.CHUNK_ELEMENTS", 3 * 3 * D * 7)  # several chunks
    found = beam_search(dirty, stages_of(codebooks), 3, mask=mask)
    good = mask.clone()
    good[0] = False
    assert torch.equal(found[good], expected[good])
    assert (found[~good] == -1).all()
    assert beam_search(x[:0], stages_of(codebooks), 3).shape == (0, 3)


def test_stages_without_weight_keep_the_best_path_first():
    """As with quantize dropout in a compiled graph: the stages after the last active one change nothing."""
    x, codebooks = data(4)
    kept = beam_search(x, stages_of(codebooks[:2]), 3)
    all_stages = beam_search(x, stages_of(codebooks), 3, weights=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(all_stages[:, :2], kept)


def test_refuses():
    x, codebooks = data()
    with pytest.raises(ValueError, match="beams, weights: must be at least 1, and 3 numbers"):
        beam_search(x, stages_of(codebooks), 0)
    with pytest.raises(ValueError, match="beams, weights"):
        beam_search(x, stages_of(codebooks), 2, weights=[1.0])
