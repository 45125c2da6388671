"""The one product for all projections of DAC's stages: when it runs, and when the project's own loop has to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvq
from fastvq.clients import dac

from .table import CLIENTS
from .test_parity import assert_alike, tensors


@pytest.fixture
def runs(monkeypatch):
    """Record for each call whether the one product served it."""
    found = []
    original = dac._all_stages

    def recorded(*arguments):
        result = original(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(dac, "_all_stages", recorded)
    return found


@pytest.mark.parametrize("name", ["transformers DAC", "descript-audio-codec"])
def test_one_product_serves_eval_without_gradients(name, runs):
    client = CLIENTS[name]
    theirs, ours, x = client.make(), client.make(), client.input()
    fastvq.accelerate(ours)
    del runs[:]
    with torch.no_grad():
        assert_alike(ours(x), theirs(x))
        assert_alike(ours(x.double().float(), 1), theirs(x, 1))
        assert_alike(ours(x, 2.0), theirs(x, 2.0))
        for module in (theirs, ours):
            with pytest.raises(RuntimeError, match="non-empty TensorList"):
                module(x, -1)
    assert runs == [True, True, True, False]
    grads = []
    for module in (theirs, ours):
        own = x.clone().requires_grad_()
        sum(t.square().sum() for t in tensors(module(own)) if t.requires_grad).backward()
        grads.append(own.grad)
    assert_alike(grads[1], grads[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tensors(ours(x))[0].dtype == tensors(theirs(x))[0].dtype
    assert runs == [True, True, True, False, False, False]


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers DAC", "snac"])
def test_shapes_on_meta(name):
    client = CLIENTS[name]
    theirs, ours, x = client.make().to("meta"), client.make(), client.input().to("meta")
    fastvq.accelerate(ours)
    found, expected = (tensors(client.encode(module, x)) for module in (ours.to("meta"), theirs))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


@torch.no_grad()
def test_the_results_may_have_names(runs):
    """As in the repository of descript-audio-codec after version 1.0.0."""
    module, x = CLIENTS["descript-audio-codec"].make(), CLIENTS["descript-audio-codec"].input()
    released = type(module)

    def forward(self, z, n_quantizers=None):
        names = ("z", "codes", "latents", "vq/commitment_loss", "vq/codebook_loss")
        return dict(zip(names, released.forward(self, z, n_quantizers), strict=True))

    module.__class__ = type("ResidualVectorQuantize", (nn.Module,), {**vars(released), "forward": forward})
    expected = module(x, 2)
    assert fastvq.accelerate(module).replaced[0].project == "descript-audio-codec 3e877db"
    del runs[:]
    found = module(x, 2)
    assert list(found) == list(expected)
    assert_alike(found, expected)
    assert runs == [True]


@torch.no_grad()
def test_projections_that_are_more_than_a_product_run_as_they_are(runs):
    client = CLIENTS["transformers DAC"]
    theirs, x = client.make(), client.input()

    class Doubled(nn.Conv1d):
        def forward(self, x):
            return 2 * super().forward(x)

    def change(module, kind):
        stage = module.quantizers[1]
        if kind == "class":
            stage.in_proj.__class__ = Doubled
        elif kind == "hook":
            stage.out_proj.register_forward_hook(lambda module, arguments, output: 2 * output)
        elif kind == "hook of the stage":
            stage.register_forward_hook(lambda module, arguments, output: (2 * output[0], *output[1:]))
        elif kind == "hook of the codebook":
            stage.codebook.register_forward_pre_hook(lambda module, arguments: (arguments[0].flip(0),))
        else:
            stage.in_proj = nn.Sequential(stage.in_proj, nn.Tanh())

    for kind in ("class", "hook", "hook of the stage", "hook of the codebook", "module"):
        theirs, ours = client.make(), client.make()
        fastvq.accelerate(ours)
        change(theirs, kind), change(ours, kind)
        del runs[:]
        assert_alike(ours(x), theirs(x))
        assert runs == [False]


@torch.no_grad()
def test_codebooks_of_offloaded_models_are_fetched_by_the_client(runs):
    client = CLIENTS["transformers DAC"]
    module, x = client.make(), client.input()
    expected = module(x)
    fastvq.accelerate(module)
    module.quantizers[0].codebook._hf_hook = None  # what the package accelerate puts there
    del runs[:]
    assert_alike(module(x), expected)
    assert runs == [False]
