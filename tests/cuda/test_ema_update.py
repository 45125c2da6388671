"""ema_update_ of csrc/cuda, in the emulator."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference

from ..cases import close, generator, weighted_by_loop
from . import emulation
from .emulation import ORDERS, run


def state(k, d, g):
    """Return a codebook, its averages and the statistics of a step."""
    counts = torch.randint(0, 5, (k,), generator=g).float()
    size = torch.rand(k, generator=g) * (torch.rand(k, generator=g) < 0.7)
    averages = torch.randn(k, d, generator=g), size, torch.randn(k, d, generator=g)
    return *averages, counts, torch.randn(k, d, generator=g) * counts[:, None]


def states():
    g = generator()
    for k, d, decay, eps in [(1, 1, 0.99, 1e-5), (37, 5, 0.8, 1e-5), (700, 3, 0.3, 0.0), (20, 64, 0.0, 1e-5)]:
        yield state(k, d, g), {"decay": decay, "eps": eps}
        weight = torch.tensor([1 / (1 - decay), 0.0, 1.0, 0.4])[torch.arange(k) % 4]
        yield state(k, d, g), {"decay": decay, "eps": eps, "weight": weight}
    zeros = torch.zeros(3), torch.zeros(3, 2)
    yield (torch.ones(3, 2), *zeros, *zeros), {"decay": 0.9, "eps": 1e-5}


@pytest.mark.parametrize("order", ORDERS)
def test_ema_update(order):
    given = list(states())
    answers = run((emulation.ema_update(*tensors, **options) for tensors, options in given), order=order, seed=5)
    for (tensors, options), answer in zip(given, answers, strict=True):
        if "weight" in options:
            expected = weighted_by_loop(tensors[:3], tensors[3:], **options)
        else:
            expected = [t.clone() for t in tensors]
            reference.ema_update_(*expected, **options)
        close(tuple(answer), tuple(expected[:3]))
