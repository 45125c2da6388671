"""The op `residual_search`: one exact search a stage, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import fastvq
from fastvq.backends import reference

from ..cases import ADVERSARIAL, DTYPES, generator


def by_definition(x, codebooks):
    residual, stages = x, []
    for codebook in codebooks:
        indices = reference.search(residual, codebook)
        stages.append(indices)
        chosen = torch.stack([codebook[i] if i >= 0 else torch.zeros_like(codebook[0]) for i in indices.tolist()])
        residual = (residual.double() - chosen.double()).float()
    return torch.stack(stages, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", ["gaussian", "offset", "non_finite_vectors", "non_finite_codes", "rounded_midpoints"])
def test_is_the_definition(data, dtype, backend):
    x, codebooks = ADVERSARIAL[data](40, 3 * 20, 7, generator())
    x, codebooks = x.to(dtype), codebooks.view(3, 20, 7)
    with fastvq.use_backend(backend):
        assert torch.equal(fastvq.residual_search(x, codebooks), by_definition(x, codebooks))
        assert fastvq.residual_search(x[:0], codebooks).shape == (0, 3)


def by_scalars(x, codebooks, metric):
    """Search in Python floats, which are IEEE float64, and round each residual to float32."""
    found = []
    for row in x.double().tolist():
        stages = []
        for codes in (codebook.double().tolist() for codebook in codebooks):
            best, least = -1, math.inf
            for place, code in enumerate(codes):
                score = 0.0
                for a, b in zip(row, code, strict=True):
                    score += (a - b) * (a - b) if metric == "l2" else -(a * b)
                if all(map(math.isfinite, (*row, *code))) and score < least:
                    best, least = place, score
            stages.append(best)
            if best >= 0:
                row = torch.tensor([a - b for a, b in zip(row, codes[best], strict=True)]).float().double().tolist()
        found.append(stages)
    return torch.tensor(found)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "data", ["duplicate_codes", "offset", "non_finite_vectors", "non_finite_codes", "codes_one_ulp_apart"]
)
def test_stages_of_several_sizes(data, dtype, metric, backend):
    x, codes = ADVERSARIAL[data](24, 37, 5, generator())
    x, sizes = x.to(dtype), (20, 1, 16)
    stages = list(codes.split(sizes))
    expected = by_scalars(x, stages, metric)
    mask = torch.arange(24) % 3 > 0
    with fastvq.use_backend(backend):
        assert torch.equal(fastvq.residual_search(x, stages, metric=metric), expected)
        apart = [torch.stack([one, one], -1)[..., 0] for one in stages]  # other strides
        masked = fastvq.residual_search(x, apart, metric=metric, mask=mask)
        assert torch.equal(masked, expected.where(mask[:, None], -1))
        pair = [codes[:36].view(2, 18, 5), codes[36:]]  # two stages in one entry
        expected = by_scalars(x, [*pair[0], pair[1]], metric)
        assert torch.equal(fastvq.residual_search(x, pair, metric=metric), expected)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("data", sorted(ADVERSARIAL))
def test_many_rows_take_the_same_codes_as_few(data, metric, backend):
    """Blocks of rows, single rows and whole batches take different ways through the native code."""
    x, codes = ADVERSARIAL[data](150, 90, 6, generator())
    stages = list(codes.split((40, 50)))
    expected = reference.residual_search(x, stages, metric=metric)
    with fastvq.use_backend(backend):
        assert torch.equal(fastvq.residual_search(x, stages, metric=metric), expected)
        for rows in ((0, 1), (3, 7), (8, 24), (70, 150)):
            part = slice(*rows)
            assert torch.equal(fastvq.residual_search(x[part], stages, metric=metric), expected[part])


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_blocks_of_rows_through_all_stages(metric):
    """More elements than stay in a cache between stages: rows are kept together in blocks."""
    g = generator()
    x, stages = torch.randn(3000, 64, generator=g), [torch.randn(size, 64, generator=g) for size in (33, 70, 5)]
    expected, residual = [], x
    for codes in stages:
        expected.append(fastvq.search(residual, codes, metric=metric))
        residual = residual - codes[expected[-1]]
    assert torch.equal(fastvq.residual_search(x, stages, metric=metric), torch.stack(expected, 1))


@pytest.mark.parametrize(
    ("codebooks", "error", "message"),
    [
        ([], ValueError, "codebooks: must hold at least one stage"),
        ([torch.ones(3, 4), torch.ones(3, 5)], ValueError, "codebooks: must have the dimension of x, D=4"),
        ([torch.ones(3, 4), torch.ones(3, 4).double()], TypeError, "codebooks: must have one dtype, got torch.float32"),
        ([torch.ones(3, 4), torch.ones(4)], ValueError, r"codebooks: must have shape \(Q, K, D\), or be a sequence of"),
        ([torch.ones(3, 4), torch.ones(0, 4)], ValueError, "codebooks: must hold at least one code"),
        (torch.ones(3, 4), ValueError, r"codebooks: must have shape \(Q, K, D\), or be a sequence of"),
        ([[1.0, 2.0]], TypeError, "codebooks"),
    ],
)
def test_stages_that_do_not_fit(codebooks, error, message, backend):
    with fastvq.use_backend(backend), pytest.raises(error, match=message):
        fastvq.residual_search(torch.ones(2, 4), codebooks)
