"""Codes given to a recomputed forward pass; tests/quantizers/test_contexts.py has layers that are checkpointed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvq.codebook.health import Health
from fastvq.codebook.recompute import History
from fastvq.distributed import recomputing


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_within_backward_is_known(use_reentrant):
    seen = []

    def layer(x):
        seen.append(recomputing())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True]
    assert not recomputing()


def test_passes_are_recalled_by_their_vectors():
    history = History()
    first, second = torch.randn(9, 4), torch.randn(9, 4)
    history.remember(first, [torch.zeros(2, 4)])
    history.remember(second, [torch.ones(2, 4)])
    assert not history.recall(first)[0].any()
    # Only one is left, which needn't match: a GPU may compute it slightly otherwise.
    assert history.recall(second + 1e-7)[0].all()


def test_a_pass_too_long_ago_is_an_error():
    history = History()
    for _ in range(3):
        history.remember(torch.randn(9, 4), [torch.zeros(2, 4)])
    with pytest.raises(RuntimeError, match="doesn't repeat one of the layer's last 2 forward passes"):
        history.recall(torch.randn(9, 4))


def test_two_equal_passes_are_recalled_backwards():
    history = History()
    x = torch.randn(9, 4)
    history.remember(x, [torch.zeros(2, 4)])
    history.remember(x, [torch.ones(2, 4)])
    assert history.recall(x)[0].all()
    assert not history.recall(x)[0].any()


def test_a_history_is_not_copied():
    history = History()
    history.remember(torch.randn(9, 4), [torch.zeros(2, 4)])
    for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        with pytest.raises(RuntimeError):
            other.recall(torch.randn(9, 4))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_health_counts_a_recomputed_forward_once(use_reentrant):
    health = Health(4)

    def layer(x):
        health.observe_(torch.tensor([1, 2]), x.square().mean())
        return x.sin()

    x = torch.randn(2, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert health.code_counts.tolist() == [0, 1, 1, 0]
    assert health.weight == 2
