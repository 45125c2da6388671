"""Residual search in one launch gives what `search` gives stage by stage."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.kernels import residual_search as kernels
from fastvq.kernels.residual_search import residual_search

from ..cases import ADVERSARIAL, COPIES, DTYPES, generator
from . import models


def stages(data, n, k, d, q):
    """Return rows, and a codebook for each stage with codes about as long as its residuals."""
    g = generator()
    x, _ = ADVERSARIAL[data](n, k, d, g)
    return x, torch.stack([ADVERSARIAL[data](n, k, d, g)[1] / (1 + stage) for stage in range(q)])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 31, 3, 3), (70, 40, 16, 2), (5, 70, 130, 2)], ids=str)
@pytest.mark.parametrize(
    "data", ["gaussian", "rounded_midpoints", "non_finite_vectors", "non_finite_codes", "values_of_1e38", "offset"]
)
def test_same_codes_as_stage_by_stage(data, shape, device):
    x, codebooks = stages(data, *shape)
    actual = residual_search(x.to(device), codebooks.to(device)).cpu()
    assert torch.equal(actual, reference.residual_search(x, codebooks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device):
    x, codebooks = stages("clustered", 9, 40, 6, 3)
    for pair in ((x.to(dtype), codebooks), (x, codebooks.to(dtype)), (x.to(dtype), codebooks.to(dtype))):
        actual = residual_search(*(t.to(device) for t in pair)).cpu()
        assert torch.equal(actual, reference.residual_search(*pair))


def test_a_stage_without_a_finite_code_takes_nothing_off(device):
    x, codebooks = stages("gaussian", 9, 20, 5, 3)
    codebooks[1] = torch.nan
    actual = residual_search(x.to(device), codebooks.to(device)).cpu()
    assert bool((actual[:, 1] == -1).all())
    assert torch.equal(actual[:, [0, 2]], reference.residual_search(x, codebooks[[0, 2]]))


@models.needs_interpreter
def test_copies_leave_no_row_to_the_definition(monkeypatch):
    names = ("copies_in_random_order", "zero_codes", "few_codes_among_zeros")
    (x, _), *_ = drawn = [COPIES[data](9, 70, 6, generator()) for data in names]
    codebooks = torch.stack([codebook for _, codebook in drawn])
    monkeypatch.setattr(kernels, "nearest", None)
    assert torch.equal(residual_search(x, codebooks), reference.residual_search(x, codebooks))


def test_rows_and_layouts(device):
    x, codebooks = stages("gaussian", 9, 20, 5, 3)
    assert residual_search(x[:0].to(device), codebooks.to(device)).shape == (0, 3)
    apart = x.repeat_interleave(2, 0).to(device)
    kept = apart.clone()
    actual = residual_search(apart[::2], codebooks.to(device).transpose(0, 1).contiguous().transpose(0, 1)).cpu()
    assert torch.equal(actual, reference.residual_search(x, codebooks))
    assert torch.equal(apart, kept), "the rows are the caller's"


@models.needs_interpreter
@pytest.mark.parametrize("model", ["H100", "at the limit"])
def test_as_matrix_units_compute(model, monkeypatch):
    assert not (calls := models.use(monkeypatch, models.MODELS[model]))
    x, codebooks = stages("rounded_midpoints", 12, 40, 9, 2)
    assert torch.equal(residual_search(x, codebooks), reference.residual_search(x, codebooks))
    assert calls
