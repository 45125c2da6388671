"""The parts of codebook learning, one by one; tests/quantizers/test_vector_quantize.py has them together."""

from __future__ import annotations

import math

import pytest
import torch

from fastvq.codebook import Codebook
from fastvq.functional.quantize import unit_norm

from ..cases import close


def test_initial_codes_are_hes_uniform():
    codebook = Codebook(16, 512).embed
    limit = math.sqrt(6 / (16 * 512))
    assert codebook.abs().max() <= limit
    assert 0.99 * limit < codebook.abs().max()
    close(codebook.std(), torch.tensor(limit / math.sqrt(3)), torch.bfloat16)
    close(Codebook(16, 8, cosine=True).embed.norm(dim=-1), torch.ones(1, 8))
    assert not Codebook(16, 8, kmeans_init=True).embed.any()


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_that_are_set_stay(cosine):
    """Averages that agree keep them where they are, and k-means doesn't take their place."""
    codebook = Codebook(4, 8, kmeans_init=True, cosine=cosine, decay=0.99)
    codes = 5 * torch.randn(8, 4)
    codebook.set_(codes[None])
    codes = unit_norm(codes) if cosine else codes
    codebook.initialise_(torch.randn(1, 20, 4))
    codebook.learn_(torch.zeros(1, 3, 4), torch.full((1, 3), -1))
    torch.testing.assert_close(codebook.codes[0], codes, rtol=1e-4, atol=1e-5)


def test_state_written_behind_its_back_is_kept():
    """Some loaders copy into the buffers themselves."""
    trained, fresh = Codebook(4, 8), Codebook(4, 8, kmeans_init=True)
    for target, source in zip(fresh.buffers(), trained.buffers(), strict=True):
        target.copy_(source)
    fresh.initialise_(torch.randn(1, 20, 4))
    assert torch.equal(fresh.codes, trained.codes)


def test_loading_in_place_of_meta_and_half_state():
    state = {name: t.half() if t.is_floating_point() else t for name, t in Codebook(4, 8).state_dict().items()}
    with torch.device("meta"):
        codebook = Codebook(4, 8)
        codebook.load_state_dict({}, strict=False)
    codebook.load_state_dict(state, assign=True)
    assert all(t.device.type == "cpu" for t in codebook.buffers())
    assert {t.dtype for t in codebook.buffers() if t.is_floating_point()} == {torch.float32}
