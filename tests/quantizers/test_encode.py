"""`encode` of every quantizer: the indices of eval mode, without changing any state."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.errors import CodebookError

from .. import every
from ..layers import assert_same_state, state

LENS = torch.tensor([16, 3, 0, 9])


@pytest.mark.parametrize("kind", every.QUANTIZERS)
@pytest.mark.parametrize("training", [True, False])
def test_encode_has_the_indices_of_eval_and_changes_nothing(kind, training):
    layer, x = every.make(kind), every.batch_for(kind)
    rows = x.transpose(1, 2) if kind == "LatentQuantize" else x
    rows[1, 2] = torch.nan
    mask = torch.arange(16) < LENS[:, None]
    with torch.no_grad():
        expected = layer.eval()(x, mask=mask)
    layer.train(training)
    before, draws = state(layer), torch.random.get_rng_state()
    for options in ({"mask": mask}, {"lens": LENS}):
        found = layer.encode(x, **options)
        assert torch.equal(found, expected if kind == "random projections" else expected[1])
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert_same_state(layer, before)
    assert torch.equal(layer.code_counts, torch.zeros_like(layer.code_counts))


@torch.no_grad()
def test_scales_too():
    torch.manual_seed(0)
    layer = fastvq.HierarchicalVQ(dim=6, codebook_size=12, scales=(1, 4, 16), kmeans_init=False)
    x, lens = torch.randn(2, 6, 16), torch.tensor([16, 5])
    before = state(layer)
    found = layer.encode(x, lens=lens)
    assert_same_state(layer, before)
    assert all(map(torch.equal, found, layer.eval()(x, lens=lens)[1]))


@pytest.mark.parametrize("kind", ["IBQ", "LlamaGen", "SimVQ", "residual SimVQ"])
def test_no_finite_code_is_an_error_of_encode_as_of_forward(kind):
    layer, x = every.make(kind), every.batch_for(kind)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(torch.nan)
    for call in (layer, layer.encode):
        with pytest.raises(CodebookError, match="codebook: "):
            call(x)
