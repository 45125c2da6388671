"""Encoding and decoding of indices: many small grids side by side, and one long clip."""

from __future__ import annotations

import pytest
import torch

from fastvq import coding

SHAPES = [(1000, 7, 7), (1, 750, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def bench_coding(benchmark, direction, shape):
    indices = torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(0))
    data = coding.encode(indices, 1024)
    assert torch.equal(coding.decode(data), indices)
    call = {"encode": lambda: coding.encode(indices, 1024), "decode": lambda: coding.decode(data)}[direction]
    benchmark.group = f"indices {shape}, adaptive"
    benchmark.pedantic(call, rounds=3)
