"""VectorQuantize under torch.compile and torch.export: no graph break, and the results of eager mode."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import generator


def make(layer_options, training=True):
    torch.manual_seed(0)
    return fastvq.VectorQuantize(8, 32, **layer_options).train(training)


def steps(layer, step, count=3):
    """Run `count` training steps on seeded batches and return results, gradients and the state."""
    results = []
    for i in range(count):
        x = torch.randn(6, 10, 8, generator=generator(i)).requires_grad_()
        torch.manual_seed(i)
        quantized, indices, loss = step(x)
        if layer.training:
            (quantized.square().mean() + loss).backward()
        results.append((quantized.detach(), indices, loss.detach(), x.grad))
    return results, layer.state_dict()


LAYERS = [
    {},
    {"use_cosine_sim": True, "codebook_dim": 4},
    {"kmeans_init": True, "threshold_ema_dead_code": 2, "rotation_trick": False},
    {"learnable_codebook": True},
    {"freeze_codebook": True},
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_compiles_without_a_graph_break(options, training):
    torch._dynamo.reset()
    if not training:
        options = options | {"kmeans_init": False}
    eager, compiled = make(options, training), make(options, training)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(steps(compiled, step), steps(eager, eager), rtol=1e-5, atol=1e-6)


def test_compiles_with_inductor():
    torch._dynamo.reset()
    eager, compiled = make({}), make({})
    step = torch.compile(compiled, fullgraph=True)
    torch.testing.assert_close(steps(compiled, step, 2), steps(eager, eager, 2), rtol=1e-4, atol=1e-5)


def test_compiles_for_any_batch():
    torch._dynamo.reset()
    layer = make({})
    step = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5, 8):
        assert step(torch.randn(batch, 10, 8))[1].shape == (batch, 10)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 4}, {"use_cosine_sim": True}, {"accept_image_fmap": True}], ids=str
)
def test_exports_in_eval(options, dynamic):
    layer = make(options, training=False)
    x = torch.randn(3, 8, 4, 5) if "accept_image_fmap" in options else torch.randn(3, 20, 8)
    shapes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    other = torch.cat([x, x])[:5] if dynamic else -x
    torch.testing.assert_close(program.module()(other), layer(other))
    assert "fastvq.search" in program.graph_module.code
