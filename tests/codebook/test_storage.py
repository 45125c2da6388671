"""Codes that are written where a module really keeps them, or refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrize, prune

import fastvq

DIM, SIZE = 4, 8
WRITES = {
    "k-means": {"learnable_codebook": True, "kmeans_init": True},
    "averages": {"orthogonal_reg_weight": 0.1},
    "replacement": {"learnable_codebook": True, "threshold_ema_dead_code": 2},
}


class Scaled(nn.Module):
    """A parametrization by half of the parameter."""

    def forward(self, x):
        return x / 2


class Invertible(Scaled):
    def right_inverse(self, x):
        return 2 * x


def layer(kind):
    torch.manual_seed(0)
    return fastvq.VectorQuantize(DIM, SIZE, **WRITES[kind])


def batch(seed=0):
    return torch.randn(2, 30, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", WRITES)
def test_a_parametrized_codebook(kind):
    plain, parametrized = layer(kind), layer(kind)
    parametrize.register_parametrization(parametrized._codebook, "embed", Invertible())
    for module in (plain, parametrized):
        for seed in range(2):
            torch.manual_seed(seed)
            module(batch(seed))
    assert plain.codebook.any()
    torch.testing.assert_close(parametrized.codebook, plain.codebook)


@pytest.mark.parametrize("kind", WRITES)
def test_a_parametrization_without_inverse(kind):
    module = layer(kind)
    parametrize.register_parametrization(module._codebook, "embed", Scaled())
    with pytest.raises(RuntimeError, match=r"^embed: cannot be written through its parametrization"):
        module(batch())


@pytest.mark.parametrize("kind", WRITES)
def test_a_pruned_codebook(kind):
    module = layer(kind)
    prune.random_unstructured(module._codebook, "embed", amount=0.2)
    with pytest.raises(RuntimeError, match=r"^embed: is neither a parameter nor a buffer of the codebook now"):
        module(batch())


@pytest.mark.parametrize("method", ["reinitialize_", "update_ema"])
def test_methods_that_write(method):
    module = layer("averages")
    parametrize.register_parametrization(module._codebook, "embed", Scaled())
    with pytest.raises(RuntimeError, match=r"^embed: cannot be written"):
        getattr(module._codebook, method)()


def step(module, master, optimizer, seed):
    """Step as an optimizer with float32 copies of the parameters does."""
    module.zero_grad()
    quantized, _, loss = module(batch(seed))
    (quantized.square().mean() + loss).backward()
    for parameter, own in zip(module.parameters(), master, strict=True):
        own.grad = parameter.grad.float()
    optimizer.step()
    with torch.no_grad():
        for parameter, own in zip(module.parameters(), master, strict=True):
            parameter.copy_(own)


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("accumulated", [0, 3])
def test_master_copies_that_are_older_than_the_codes(kind, accumulated):
    module = layer(kind)
    master = [p.detach().clone().requires_grad_() for p in module.parameters()]
    optimizer = torch.optim.Adam(master, lr=1e-3)
    for seed in range(accumulated):
        module(batch(seed))
    step(module, master, optimizer, accumulated)
    with pytest.raises(RuntimeError, match=r"^embed: the codes that were written to it are lost"):
        module(batch(9))


def test_master_copies_that_are_made_after_kmeans():
    module = layer("k-means")
    module(batch())
    codes = module.codebook.detach().clone()
    master = [p.detach().clone().requires_grad_() for p in module.parameters()]
    for seed in range(4):
        step(module, master, torch.optim.Adam(master, lr=1e-3), seed)
    assert (module.codebook - codes).abs().max() < 0.01


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_ordinary_optimizers_and_copies(kind, lr):
    """Nothing is called lost where the optimizer steps the parameters themselves, by however much."""
    module = layer(kind)
    for scale in (1e-4, 1.0):
        optimizer = torch.optim.Adam(module.parameters(), lr=lr)
        for seed in range(6):
            module.zero_grad()
            quantized, _, loss = module(scale * batch(seed))
            (quantized.square().mean() + loss).backward()
            optimizer.step()
            assert module.codebook.isfinite().all()
        module = copy.deepcopy(module)
        module._codebook.reinitialize_()


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("kind", ["plain", "learnable", *WRITES])
def test_flat_parameters(kind, original, tmp_path):
    """FullyShardedDataParallel trains a codebook that a gradient or nobody writes to, and is refused by others."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        settings = {"plain": {}, "learnable": {"learnable_codebook": True}} | WRITES
        layer = fastvq.VectorQuantize(DIM, SIZE, **settings[kind])
        model = nn.Sequential(nn.Linear(DIM, DIM), layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))

        def step():
            quantized, _, loss = model(torch.randn(2, 16, DIM))
            (quantized.sum() + loss).backward()

        if kind in WRITES:
            with pytest.raises(RuntimeError, match="embed: is neither a parameter nor a buffer"):
                step()
        else:
            step()
    finally:
        dist.destroy_process_group()
