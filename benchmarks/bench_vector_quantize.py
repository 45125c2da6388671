"""A training step of the layer (forward, backward, EMA) beside vector_quantize_pytorch's."""

from __future__ import annotations

import pytest
import torch
import vector_quantize_pytorch

import fastvq

from .cases import clustered

LAYERS = {"fastvq": fastvq.VectorQuantize, "vector_quantize_pytorch": vector_quantize_pytorch.VectorQuantize}
SHAPES = [(16384, 512, 64), (16384, 8192, 64), (16384, 1024, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def bench_training_step(benchmark, name, shape):
    n, k, d = shape
    x, codebook = clustered(n, k, d)
    x = x[None].requires_grad_()
    layer = LAYERS[name](dim=d, codebook_size=k, decay=0.99)
    with torch.no_grad():
        layer.codebook = codebook
    check_first_step(layer, x, codebook)

    def step() -> None:
        quantized, _, loss = layer(x)
        x.grad = None
        (quantized.sum() + loss).backward()

    benchmark.group = f"training step N={n} K={k} D={d}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def check_first_step(layer: torch.nn.Module, x: torch.Tensor, codebook: torch.Tensor) -> None:
    """The codes of both layers are right, up to the peer's rounding, before either is timed."""
    layer.eval()
    _, indices, _ = layer(x)
    layer.train()
    agree = (indices.flatten() == fastvq.search(x[0].detach(), codebook)).float().mean()
    assert agree > 0.999
