"""The moving averages, to the last bits those of torch."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.kernels import ema_update as kernels
from fastvq.kernels.ema_update import ema_update_

from ..cases import close, generator, weighted_by_loop
from .test_accumulate import guard


@pytest.fixture
def poison(monkeypatch):
    yield from guard(monkeypatch)


def state_and_statistics(k, d):
    g = generator()
    cluster_size, counts = 5 * torch.rand(k, generator=g), torch.randint(0, 4, (k,), generator=g).float()
    state = [torch.randn(k, d, generator=g), cluster_size, torch.randn(k, d, generator=g)]
    return state, [counts, torch.randn(k, d, generator=g) * counts[:, None]]


def update(state, statistics, device, **options):
    state = [t.to(device, copy=True) for t in state]
    assert ema_update_(*state, *(t.to(device) for t in statistics), **options) is None
    return [t.cpu() for t in state]


def expected_of(state, statistics, **options):
    state = [t.clone() for t in state]
    reference.ema_update_(*state, *statistics, **options)
    return state


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_equals_the_reference(eps, decay, device, poison):
    for shape in [(1, 1), (7, 3), (100, 33), (33, 257)]:
        state, statistics = state_and_statistics(*shape)
        actual = update(state, statistics, device, decay=decay, eps=eps)
        for a, b in zip(actual, expected_of(state, statistics, decay=decay, eps=eps), strict=True):
            close(a, b)
        if decay in (0.0, 1.0):
            source = statistics if decay == 0 else state[1:]
            assert torch.equal(actual[1], source[0])
            assert torch.equal(actual[2], source[1])


def weights(k):
    """Shares of 0 and 1 with decay 0.75, between and beyond them."""
    return torch.tensor([0.0, 4.0, 1.0, 0.3, 2.5])[torch.arange(k) % 5]


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_a_weight_scales_the_step_of_each_code(decay, device, poison):
    for shape in [(1, 1), (7, 3), (100, 33), (33, 257)]:
        state, statistics = state_and_statistics(*shape)
        weight = weights(shape[0])
        actual = update(state, statistics, device, decay=decay, eps=1e-5, weight=weight.to(device))
        for a, b in zip(actual, weighted_by_loop(state, statistics, weight, decay, 1e-5), strict=True):
            close(a, b)
        for k, share in enumerate(((1 - decay) * weight).tolist()):
            if share in (0, 1):
                source = statistics if share else state[1:]
                assert torch.equal(actual[1][k], source[0][k])
                assert torch.equal(actual[2][k], source[1][k])


def test_a_weight_of_one_changes_no_bit(device):
    state, statistics = state_and_statistics(100, 33)
    plain = update(state, statistics, device, decay=0.8, eps=1e-5)
    weighted = update(state, statistics, device, decay=0.8, eps=1e-5, weight=torch.ones(200, device=device)[::2])
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


def test_more_sizes_than_a_program_sums(device, monkeypatch, poison):
    """Blocks of sizes, of totals, and a rest of each."""
    monkeypatch.setattr(kernels, "BLOCK_SIZES", 8)
    monkeypatch.setattr(kernels, "BLOCK_TOTALS", 4)
    state, statistics = state_and_statistics(8 * 9 + 3, 2)
    options = {"decay": 0.7, "eps": 1e-3}
    for a, b in zip(
        update(state, statistics, device, **options), expected_of(state, statistics, **options), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("block", [1, kernels.BLOCK_SIZES])
def test_the_total_is_a_float64_sum(block, device, monkeypatch):
    """In float32 some of the ones would vanish beside 2^25, within a block and over blocks."""
    monkeypatch.setattr(kernels, "BLOCK_SIZES", block)
    sizes = torch.tensor([2.0**25, *[1.0] * 64, -(2.0**25)])
    state = [torch.zeros(66, 1), sizes, torch.ones(66, 1)]
    codebook, *_ = update(state, [torch.zeros(66), torch.zeros(66, 1)], device, decay=1.0, eps=1.0)
    close(codebook[1:-1, 0], torch.full((64,), (64 + 66) / (2 * 64)))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_codebook_that_never_saw_a_vector_stays(eps, device):
    codebook, empty = torch.randn(6, 4, generator=generator()), [torch.zeros(6), torch.zeros(6, 4)]
    after = update([codebook, *empty], empty, device, decay=0.9, eps=eps)
    assert torch.equal(after[0], codebook)
    assert not any(t.any() for t in after[1:])


def test_without_smoothing_a_code_of_size_zero_stays(device):
    state, statistics = state_and_statistics(5, 3)
    state[1][2] = statistics[0][2] = 0
    after = update(state, statistics, device, decay=0.5, eps=0.0)
    assert torch.equal(after[0][2], state[0][2])
    assert bool(after[0].isfinite().all())
    assert not torch.equal(after[0][1], state[0][1])


def test_state_may_be_views(device):
    """Tensors of the state may be views of one storage: the update reaches it and touches nothing else."""
    state, statistics = state_and_statistics(20, 6)
    expected = update(state, statistics, device, decay=0.8, eps=1e-5)
    storage = torch.full((20, 2 * 6 + 1, 2), torch.nan, device=device)
    views = [storage[:, :6, 0], storage[:, 12, 0], storage[:, 6:12, 0]]
    for view, values in zip(views, state, strict=True):
        view.copy_(values)
    transposed = statistics[1].T.contiguous().T.to(device)
    ema_update_(*views, statistics[0].to(device), transposed, decay=0.8, eps=1e-5)
    for view, values in zip(views, expected, strict=True):
        assert torch.equal(view.cpu(), values)
    assert bool(storage[..., 1].isnan().all())


def test_the_same_at_every_run(device):
    state, statistics = state_and_statistics(300, 10)
    first, second = (update(state, statistics, device, decay=0.8, eps=1e-5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
