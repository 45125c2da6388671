"""Each client before and after `accelerate`: indices, results, training, copies, checkpoints, precision."""

from __future__ import annotations

import copy
import inspect
import io
import sys

import pytest
import torch
from torch import Tensor, nn

import fastvq
from fastvq.clients.adapter import is_accelerated
from fastvq.clients.registry import ADAPTERS

from . import installed
from .table import CLIENTS, Client

TRAINED = {name: client for name, client in CLIENTS.items() if client.train}

every = pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
every_trained = pytest.mark.parametrize("client", TRAINED.values(), ids=TRAINED)
STEPS = 20
"""Enough for moshi, which replaces unused codes at every fifth step."""


def accelerated(client: Client) -> nn.Module:
    """Return an accelerated module; but for the first of a client, without the trials of `accelerate`."""
    module = client.make()
    if client not in ACCELERATED:
        assert len(fastvq.accelerate(module).replaced) == client.replaced
        ACCELERATED[client] = {name: type(one) for name, one in module.named_modules() if is_accelerated(one)}
    for name, kind in ACCELERATED[client].items():
        module.get_submodule(name).__class__ = kind
    return module


ACCELERATED: dict[Client, dict[str, type]] = {}
"""The classes of accelerated modules, by their names within the client."""


def run(client: Client, module: nn.Module, x: Tensor):
    """Encode x; some clients draw random numbers at the first call."""
    torch.manual_seed(0)
    return client.encode(module, x)


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value or () for tensor in tensors(one)] if isinstance(value, (list, tuple)) else []


def indices(value) -> list[Tensor]:
    return [tensor for tensor in tensors(value) if not tensor.is_floating_point()]


def assert_alike(ours, theirs, rtol=1e-3, atol=1e-5) -> None:
    assert type(ours) is type(theirs)
    ours, theirs = tensors(ours), tensors(theirs)
    assert len(ours) == len(theirs) > 0
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.dtype) == (their.shape, their.dtype)
        torch.testing.assert_close(mine, their, rtol=rtol, atol=atol)


@every
@torch.no_grad()
def test_results_are_the_clients_with_the_indices_of_float64(client):
    theirs, ours, x = client.make(), accelerated(client), client.input()
    result = run(client, ours, x)
    assert_alike(result, run(client, theirs, x))
    exact = run(client, client.make().double(), x.double())
    assert indices(result)
    assert all(map(torch.equal, indices(result), indices(exact)))


@every
def test_signatures_and_names_stay(client):
    theirs, ours = client.make(), accelerated(client)
    assert repr(ours) == repr(theirs)
    for mine, their in zip(ours.modules(), theirs.modules(), strict=True):
        assert isinstance(mine, type(their)) or not is_accelerated(mine)
        for adapter in ADAPTERS:
            if isinstance(mine, adapter.methods):
                for name in adapter.replaced:
                    own, client_own = inspect.signature(getattr(mine, name)), inspect.signature(getattr(their, name))
                    assert [(p.name, p.kind, p.default) for p in own.parameters.values()] == [
                        (p.name, p.kind, p.default) for p in client_own.parameters.values()
                    ]


@every_trained
def test_training_is_the_clients(client):
    histories = []
    for module in (client.make(), accelerated(client)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01) if list(module.parameters()) else None
        module.train()
        history = []
        for step in range(STEPS):
            torch.manual_seed(step)
            x = client.input(step).requires_grad_()
            result = client.train(module, x)
            sum(t.square().mean() for t in tensors(result) if t.requires_grad).backward()
            history.append((result, x.grad, torch.random.get_rng_state()))
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        histories.append((history, module.state_dict()))
    (theirs, state), (ours, own_state) = histories
    for mine, their in zip(ours, theirs, strict=True):
        assert_alike(mine, their, rtol=1e-2, atol=1e-4)
    assert_alike(dict(own_state), dict(state), rtol=1e-2, atol=1e-4)


@every
@torch.no_grad()
def test_checkpoints_pass_both_ways_and_writes_through_data_are_seen(client):
    theirs, ours, x = client.make(seed=5), accelerated(client), client.input()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    run(client, ours, x)  # whatever is kept between calls is kept now
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for module in ours.modules():  # Mimi's and moshi's own caches of codes do not see new weights
        if "_embed" in vars(module):
            module._embed = None
        if "_embedding" in module._buffers:
            module._embedding = None
    assert_alike(run(client, ours, x), run(client, theirs, x))
    for source, target in zip(client.make(seed=6).parameters(), ours.parameters(), strict=True):
        target.data.copy_(source)
    other = client.make(seed=7)
    other.load_state_dict(ours.state_dict(), strict=True)
    assert_alike(run(client, ours, x), run(client, other, x))


@every
@torch.no_grad()
def test_copies_stay_accelerated_and_pickles_do_not(client):
    ours, x = accelerated(client), client.input()
    result = run(client, ours, x)
    for copied in (copy.deepcopy(ours), copy.copy(ours)):
        assert sum(map(is_accelerated, copied.modules())) == client.replaced
        assert_alike(run(client, copied, x), result, rtol=0, atol=0)
    if not type(ours).__module__.startswith(("transformers", "vector_quantize_pytorch")):
        return  # pickle cannot import the module
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not any(map(is_accelerated, loaded.modules()))
    assert_alike(run(client, loaded, x), result)


@every
@torch.no_grad()
def test_restore_gives_the_clients_classes_back(client):
    theirs, ours, x = client.make(), accelerated(client), client.input()
    assert fastvq.accelerate(ours) == fastvq.accelerate(ours)  # a second time changes nothing
    assert len(fastvq.restore(ours)) == client.replaced
    assert not fastvq.restore(ours)
    assert not any(map(is_accelerated, ours.modules()))
    assert type(ours) is type(theirs)
    assert [set(vars(one)) for one in ours.modules()] == [set(vars(one)) for one in theirs.modules()]
    assert_alike(run(client, ours, x), run(client, theirs, x), rtol=0, atol=0)


@every
@torch.no_grad()
def test_a_row_with_nan_gets_the_index_that_the_client_gives_it(client):
    theirs, ours, x = client.make(), accelerated(client), client.input()
    x[0] = torch.nan
    found = indices(run(client, ours, x))
    assert all(map(torch.equal, found, indices(run(client, theirs, x))))
    x[0] = torch.inf
    assert all(int(one.min()) >= 0 for one in indices(run(client, ours, x)))


@every
@torch.no_grad()
def test_half_precision(client):
    theirs, ours, x = client.make().bfloat16(), accelerated(client).bfloat16(), client.input().bfloat16()
    result, expected = run(client, ours, x), run(client, theirs, x)
    for mine, their in zip(tensors(result), tensors(expected), strict=True):
        assert (mine.shape, mine.dtype) == (their.shape, their.dtype)
    stages = [one.cpu() for one in indices(result)]
    assert all(int(one.max()) < 64 for one in stages)


COMPILED = {name: client.encode for name, client in CLIENTS.items() if name != "vector_quantize_pytorch"}
# Its from_latents counts by numpy, which the compiler can't trace.
COMPILED["descript-audio-codec"] = lambda module, x: (module(x), module(x, 2))


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_compiled_without_a_graph_break(name, monkeypatch):
    client = CLIENTS[name]
    ours, x = accelerated(client), client.input()
    torch.manual_seed(0)
    expected = COMPILED[name](ours, x)
    for kind in {kind for module in ours.modules() for kind in type(module).__mro__}:
        if kind.__module__ not in sys.modules:  # a package without its requirements, which the compiler looks up
            monkeypatch.setitem(sys.modules, kind.__module__, installed.module(kind.__module__))
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], backend="eager", fullgraph=True)
    torch.manual_seed(0)
    assert_alike(compiled(ours, x), expected)


def test_the_peer_does_not_compile_without_a_graph_break_either():
    client = CLIENTS["vector_quantize_pytorch"]
    for module in (client.make(), accelerated(client)):
        torch._dynamo.reset()
        compiled = torch.compile(client.encode, backend="eager", fullgraph=True)
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent"):
            compiled(module, client.input())
