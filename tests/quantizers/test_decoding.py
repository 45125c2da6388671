"""Decoding of indices from other sources, for every quantizer that decodes."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.parts.indices import STORAGE_DTYPES

from .. import every


def methods(kind):
    module = every.make(kind)
    names = ("get_codes_from_indices", "get_output_from_indices", "indices_to_codes")
    return [name for name in names if hasattr(module, name)]


DECODERS = [(kind, method) for kind in every.QUANTIZERS for method in methods(kind)]


def indices_of(module, kind):
    with torch.no_grad():
        return module.eval()(every.batch_for(kind))[1]


@pytest.mark.parametrize(("kind", "method"), DECODERS)
def test_stored_in_any_integers(kind, method):
    module = every.make(kind)
    decode, indices = getattr(module, method), indices_of(module, kind)
    expected = decode(indices.long())
    for dtype in (*STORAGE_DTYPES, torch.int32):
        assert torch.equal(decode(indices.to(dtype)), expected), dtype


@pytest.mark.parametrize(("kind", "method"), DECODERS)
def test_invalid_indices_are_named(kind, method):
    module = every.make(kind)
    decode, indices = getattr(module, method), indices_of(module, kind)
    with pytest.raises(TypeError, match=r"^indices: must be integers, got torch\.float32"):
        decode(indices.float())
    for wrong in (-2, 10_000):
        mistaken = indices.clone(memory_format=torch.contiguous_format)
        mistaken.view(-1)[-1] = wrong
        with pytest.raises(IndexError, match=rf"^indices: must lie in \[-1, \d+\)( at stage \d)?, got {wrong}$"):
            decode(mistaken)


def test_the_stage_is_named():
    residual = fastvq.ResidualVQ(dim=6, codebook_size=(12, 8))
    with pytest.raises(IndexError, match=r"must lie in \[-1, 8\) at stage 1, got 9"):
        residual.get_output_from_indices(torch.tensor([[3, 9]]))


def test_empty_indices():
    assert fastvq.VectorQuantize(6, 12).get_output_from_indices(torch.zeros(0, 3).byte()).shape == (0, 3, 6)
    assert fastvq.ResidualVQ(dim=6, num_quantizers=2, codebook_size=12).get_output_from_indices(
        torch.zeros(0, 2).short()
    ).shape == (0, 6)


def test_compiled_decoding():
    vq = fastvq.VectorQuantize(6, 12)
    decode = torch.compile(vq.get_output_from_indices, fullgraph=True, backend="aot_eager")
    indices = torch.tensor([[0, 5, -1]], dtype=torch.uint8).clamp(0, 11)
    assert torch.equal(decode(indices), vq.get_output_from_indices(indices))
