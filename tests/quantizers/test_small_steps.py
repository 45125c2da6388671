"""What a step on a few vectors costs beside its arithmetic: dispatched operations, which are counted, not timed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastvq
from fastvq.codebook.health import Health, observe_levels_

from ..cases import close


class Counting(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd, views among it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def vector_quantize(**settings):
    return fastvq.VectorQuantize(64, 512, **settings)


def residual_vq(levels=8, **settings):
    return fastvq.ResidualVQ(dim=64, num_quantizers=levels, codebook_size=256, **settings)


def operations(call):
    call()  # what only a first call does
    with Counting() as counting:
        call()
    return counting.count


def step(layer):
    x = torch.randn(1, 4, 64, requires_grad=True)
    ones = torch.ones_like(x)

    def call():
        quantized, _, loss = layer(x)
        torch.autograd.backward([quantized, loss], [ones, torch.ones_like(loss)])

    return operations(call)


@torch.no_grad()
def evaluation(call, x):
    return operations(lambda: call(x))


# Each limit is a tenth above the count with torch 2.13, which may count a view more or less elsewhere.
@pytest.mark.parametrize(
    ("layer", "most"),
    [
        (vector_quantize, 55),
        (lambda: vector_quantize(freeze_codebook=True), 41),
        (lambda: vector_quantize(threshold_ema_dead_code=2), 102),
        (residual_vq, 125),
    ],
    ids=["VectorQuantize", "frozen", "revival", "ResidualVQ"],
)
def test_a_training_step(layer, most):
    assert step(layer()) <= most


def test_a_level_more():
    assert step(residual_vq(9)) - step(residual_vq(8)) <= 9


@pytest.mark.parametrize(
    ("layer", "most", "most_encoding", "most_decoding"), [(vector_quantize, 18, 5, 10), (residual_vq, 19, 9, 29)]
)
def test_evaluation(layer, most, most_encoding, most_decoding):
    layer, x = layer().eval(), torch.randn(1, 4, 64)
    assert evaluation(layer, x) <= most
    assert evaluation(layer.encode, x) <= most_encoding
    assert evaluation(layer.get_output_from_indices, layer.encode(x)) <= most_decoding


@pytest.mark.parametrize("layer", [vector_quantize, residual_vq])
def test_codes_are_remembered_where_checkpointing_may_repeat_them(layer):
    layer, x = layer(), torch.randn(1, 4, 64, requires_grad=True)
    layer(x)
    assert not layer._history._passes
    for use_reentrant in (True, False):
        checkpoint(layer, x, use_reentrant=use_reentrant)
    assert len(layer._history._passes) == 2


def test_levels_are_observed_as_if_apart():
    together, apart = ([Health(5) for _ in range(3)] for _ in range(2))
    for seed, errors in enumerate(([1.0, 2.0, torch.nan], [3.0, 1.0, 4.0], [0.5, torch.nan, 1.0])):
        torch.manual_seed(seed)
        indices = torch.randint(-1, 5, (3, 1, 7))
        indices[torch.tensor(errors).isnan()] = -1
        observe_levels_(together, indices, torch.tensor(errors))
        for health, chosen, error in zip(apart, indices, errors, strict=True):
            health.observe_(chosen, torch.tensor(error))
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.code_counts, other.code_counts)
        assert torch.equal(one.weight, other.weight)
        close(one.error, other.error)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_what_is_added_to_the_loss_stays_out_of_the_breakdown(training, weight):
    layer, x = vector_quantize(commitment_weight=weight).train(training), torch.randn(1, 4, 64, requires_grad=True)
    *_, loss, breakdown = layer(x, return_loss_breakdown=True)
    before = [float(part.detach()) for part in breakdown]
    loss += 1
    assert [float(part.detach()) for part in breakdown] == before
    *_, loss = layer(x)
    loss += x.sum()
    loss.backward()
