"""The op `residual_search`: one exact search a stage, on every backend."""

from __future__ import annotations

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
