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
    """Return a copy of the state, and of what isn't saved: code counts, reservoirs, constants ..."""
    named = [*module.named_parameters(), *module.named_buffers()]
    for place, part in module.named_modules():
        for name in (*getattr(part, "_statistics", ()), *getattr(part, "_constants", ())):
            if getattr(part, name) is not None:
                named.append((f"{place}.{name}" if place else name, getattr(part, name)))
    return {name: t.detach().clone() for name, t in named}


def assert_same_state(module, before):
    """All state but what `health` counts, which goes on while a codebook is frozen."""
    for name, t in state(module).items():
        if "_health." not in name:
            assert t.dtype == before[name].dtype
            assert torch.equal(t, before[name]), name


def train(module, steps=3, dtype=torch.float32, **forward):
    for seed in range(steps):
        module(batch(seed=seed).to(dtype), **forward)
    return module
