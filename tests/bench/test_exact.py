"""The check of all rows in float64: it returns the specification's indices, also where a product can't decide."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.bench.exact import nearest

from ..cases import ADVERSARIAL, HALF, METRICS, generator


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("data", ADVERSARIAL)
def test_the_definition_on_adversarial_data(data, metric):
    for shape in [(1, 1, 1), (17, 31, 3), (63, 100, 33)]:
        x, codebook = ADVERSARIAL[data](*shape, generator())
        assert torch.equal(nearest(x, codebook, metric=metric), reference.search(x, codebook, metric=metric)), shape


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_where_codes_collide(dtype):
    x, codebook = (t.to(dtype) for t in ADVERSARIAL["gaussian"](200, 900, 1, generator()))
    assert len(codebook.unique(dim=0)) < len(codebook)
    assert torch.equal(nearest(x, codebook), reference.search(x, codebook))


def test_rows_beyond_a_chunk(monkeypatch):
    monkeypatch.setattr("fastvq.bench.exact.CHUNK_ELEMENTS", {"cpu": 64})
    x, codebook = ADVERSARIAL["duplicate_codes"](50, 30, 4, generator())
    assert torch.equal(nearest(x, codebook), reference.search(x, codebook))


def test_no_rows():
    assert nearest(torch.empty(0, 3), torch.randn(5, 3)).shape == (0,)
