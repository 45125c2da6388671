"""Small batches through stacks of codebooks; `fastvq bench --suite` times them beside quantizers of other codecs."""

from __future__ import annotations

import functools

import pytest
import torch

import fastvq
from fastvq.bench import small

WAYS = {
    "stack": lambda codebooks: functools.partial(fastvq.residual_search, codebooks=codebooks),
    "list": lambda codebooks: functools.partial(fastvq.residual_search, codebooks=[c.clone() for c in codebooks]),
    "PackedCodebook": lambda codebooks: functools.partial(
        fastvq.residual_search, codebooks=fastvq.PackedCodebook(codebooks)
    ),
    "ResidualVQ": lambda codebooks: small.layer_of(codebooks).encode,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", small.ROWS)
@pytest.mark.parametrize("stack", small.STACKS, ids=str)
def bench_encode(benchmark, stack, rows, way):
    x, codebooks = small.rows_of(stack, rows), small.codebooks_of(stack)
    call = WAYS[way](codebooks)
    assert torch.equal(call(x), small.expected_indices(x, codebooks))
    benchmark.group = f"encode N={rows} {stack}"
    benchmark.pedantic(call, (x,), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("rows", small.ROWS)
@pytest.mark.parametrize("stack", small.STACKS, ids=str)
def bench_decode(benchmark, stack, rows):
    codebooks = small.codebooks_of(stack)
    indices = small.expected_indices(small.rows_of(stack, rows), codebooks)
    layer = small.layer_of(codebooks)
    expected = sum(codebook[one] for codebook, one in zip(codebooks, indices.T, strict=True))
    assert torch.equal(layer.get_output_from_indices(indices), expected)
    benchmark.group = f"decode {stack}"
    benchmark.pedantic(layer.get_output_from_indices, (indices,), rounds=20, warmup_rounds=2)
