"""A small layer, batches for it, and what it holds: shared by the tests of the layer."""

from __future__ import annotations

import torch

import fastvq

from .cases import generator

DIM, SIZE = 6, 12


def layer(**options):
    torch.manual_seed(0)
    return fastvq.VectorQuantize(options.pop("dim", DIM), options.pop("codebook_size", SIZE), **options)


def batch(*shape, seed=0):
    return torch.randn(*(shape or (4, 10, DIM)), generator=generator(seed))


def state(module):
    """Return a copy of the state, code counts included."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def assert_same_state(module, before):
    """All state but what `health` counts, which goes on while a codebook is frozen."""
    for name, t in state(module).items():
        if not name.startswith("_health."):
            assert t.dtype == before[name].dtype
            assert torch.equal(t, before[name]), name


def train(module, steps=3, dtype=torch.float32, **forward):
    for seed in range(steps):
        module(batch(seed=seed).to(dtype), **forward)
    return module
