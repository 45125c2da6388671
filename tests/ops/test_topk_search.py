"""The op `topk_search`, against sorted scalar scores and the specification."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.backends import reference

from ..cases import ADVERSARIAL, DTYPES, FLOAT64_ONLY, HALF, METRICS, generator

EVERY_DTYPE = ("gaussian", "clustered", "lattice", "non_finite_codes")


def by_definition(x, codebook, k, metric):
    """Sort by scalar scores: Python's tuples compare score, then index."""
    result = []
    for row in x.double().tolist():
        scored = []
        for index, code in enumerate(codebook.double().tolist()):
            score = 0.0
            for a, b in zip(row, code, strict=True):
                score += (a - b) * (a - b) if metric == "l2" else -(a * b)
            if torch.tensor(row + code, dtype=torch.float64).isfinite().all():
                scored.append((torch.inf if score != score else score, index))
        nearest = [index for _, index in sorted(scored)[:k]]
        result.append(nearest + [-1] * (k - len(nearest)))
    return torch.tensor(result, dtype=torch.int64).reshape(len(x), k)


@pytest.mark.parametrize("data", [*ADVERSARIAL, *FLOAT64_ONLY])
def test_reference_is_the_definition(data):
    for metric in METRICS:
        for n, size, d in [(1, 1, 1), (6, 9, 3)]:
            x, codebook = (ADVERSARIAL | FLOAT64_ONLY)[data](n, size, d, generator())
            k = min(5, size)
            expected = by_definition(x, codebook, k, metric)
            actual = reference.topk_search(x, codebook, k, metric=metric)
            assert torch.equal(actual, expected)
            assert torch.equal(actual[:, 0], reference.search(x, codebook, metric=metric))


@pytest.mark.parametrize("data", [*ADVERSARIAL, *FLOAT64_ONLY])
def test_equals_the_reference(data, backend):
    for dtype in DTYPES:
        if (data in FLOAT64_ONLY and dtype != torch.float64) or (data not in EVERY_DTYPE and dtype in HALF):
            continue
        x, codebook = (t.to(dtype) for t in (ADVERSARIAL | FLOAT64_ONLY)[data](23, 130, 6, generator()))
        for metric in METRICS:
            for k in (3, 32, 130):
                expected = reference.topk_search(x, codebook, k, metric=metric)
                with fastvq.use_backend(backend):
                    assert torch.equal(fastvq.topk_search(x, codebook, k, metric=metric), expected), (dtype, metric, k)


def test_large_shapes(backend):
    for k in (1, 8, 32, 70):
        for n, size, d in [(63, 1000, 96), (21, 5000, 2), (9, 70, 513), (0, 70, 3)]:
            for data in ("clustered", "far_codes"):
                x, codebook = ADVERSARIAL[data](n, size, d, generator())
                with fastvq.use_backend(backend):
                    assert torch.equal(fastvq.topk_search(x, codebook, k), reference.topk_search(x, codebook, k))


def test_tiles_of_codes_meet(monkeypatch):
    for tile in (1, 3, 64):
        monkeypatch.setattr("fastvq.backends.torch.search.TILE_CODES", tile)
        for data in ("gaussian", "lattice", "far_codes", "non_finite_codes"):
            x, codebook = ADVERSARIAL[data](40, 200, 4, generator())
            with fastvq.use_backend("torch"):
                assert torch.equal(fastvq.topk_search(x, codebook, 7), reference.topk_search(x, codebook, 7))


def test_the_same_for_any_number_of_threads_and_any_batch(backend):
    x, codebook = ADVERSARIAL["clustered"](300, 500, 16, generator())
    with fastvq.use_backend(backend):
        whole = fastvq.topk_search(x, codebook, 9)
        assert torch.equal(torch.cat([fastvq.topk_search(part, codebook, 9) for part in x.split(37)]), whole)
        torch.set_num_threads(1)
        assert torch.equal(fastvq.topk_search(x, codebook, 9), whole)


def test_fewer_finite_codes_than_k(backend):
    x, codebook = torch.randn(20, 3), torch.full((40, 3), torch.nan)
    codebook[[4, 7, 30]] = torch.randn(3, 3)
    with fastvq.use_backend(backend):
        indices = fastvq.topk_search(x, codebook, 5)
    assert torch.equal(indices[:, :3].sort(1).values, torch.tensor([4, 7, 30]).expand(20, 3))
    assert (indices[:, 3:] == -1).all()


def test_heads_and_masks(backend):
    x, codebook = torch.randn(3, 50, 4), torch.randn(3, 60, 4)
    x[1, 5, 2] = torch.nan
    mask = torch.rand(3, 50, generator=generator()) < 0.6
    expected = torch.stack([reference.topk_search(*pair, 4) for pair in zip(x, codebook, strict=True)])
    with fastvq.use_backend(backend):
        assert torch.equal(fastvq.topk_search(x, codebook, 4), expected)
        masked = fastvq.topk_search(x, codebook, 4, mask=mask)
    assert torch.equal(masked, expected.masked_fill(~mask[..., None], -1))


@pytest.mark.parametrize(("k", "codes", "most"), [(0, 4, 4), (5, 4, 4), (51, 50, 50)])
def test_refuses_a_k_out_of_range(k, codes, most):
    with pytest.raises(ValueError, match=rf"k: must lie in \[1, {most}\] for {codes} codes, got {k}"):
        fastvq.topk_search(torch.zeros(2, 3), torch.zeros(codes, 3), k)
