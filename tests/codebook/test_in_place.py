"""The codebook's own optimizer."""

from __future__ import annotations

import copy

import torch

import fastvq


def test_parameters_that_were_put_in_the_place_of_others_are_stepped():
    """As load_state_dict(assign=True) does."""

    def make():
        return fastvq.VectorQuantize(
            6, 10, learnable_codebook=True, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
        )

    layer, same = make(), make()
    state = copy.deepcopy(layer.state_dict())
    same.load_state_dict(copy.deepcopy(state), assign=True)
    x = torch.randn(3, 9, 6)
    for module in (layer, same):
        module(x)
    assert not torch.equal(same.codebook, state["_codebook.embed"][0])
    assert torch.equal(same.codebook, layer.codebook)
