"""Neural codes: the network of QINCo, in chunks and at once."""

from __future__ import annotations

import torch
from vector_quantize_pytorch.residual_vq import MLP

from fastvq.parts.tables import NeuralCodes

from ..cases import close, generator


def test_the_network_is_the_peers():
    for options in ({}, {"dim_hidden": 9, "depth": 2}, {"l2norm_output": True}):
        theirs, ours = MLP(6, **options), NeuralCodes(6, **options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        codes, condition = torch.randn(7, 6, generator=generator()), torch.randn(2, 5, 6, generator=generator(1))
        close(ours(codes, condition=condition[:, :, None]), theirs(codes, condition=condition))


def test_chunks_cover_all_rows(monkeypatch):
    network, codes, condition = NeuralCodes(6), torch.randn(7, 6), torch.randn(23, 6)
    whole = network(codes, condition=condition[:, None])
    for elements in (1, 7 * 6 * 4, 10**9):
        monkeypatch.setattr("fastvq.parts.tables.CHUNK_ELEMENTS", elements)
        parts = list(network.by_rows(codes, condition))
        assert max(len(part) for _, part in parts) <= max(1, elements // 42)
        close(torch.cat([part for _, part in parts]), whole)
