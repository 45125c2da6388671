"""Training steps of layers on a few vectors, as in streaming codecs and small models, where overhead dominates.

They are compared with vector_quantize_pytorch in the same state; each result is checked first. Batches vary and
learning restarts every round: on a single batch, most codes would die.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import fastvq

BATCHES, CALLS, ROUNDS = 16, 16, 40
LAYERS = {
    "VectorQuantize": ({"dim": 64, "codebook_size": 512}, (1, 16, 64)),
    "ResidualVQ": ({"dim": 64, "num_quantizers": 8, "codebook_size": 1024}, (1, 4, 64)),
}
PACKAGES = ("fastvq", "vector_quantize_pytorch")


def built(name, package):
    """Return the layer of this package, with codes as spread as the vectors, and batches for it."""
    options, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = getattr(fastvq, name)(**options)
    for stage, codebook in enumerate(part for part in layer.modules() if isinstance(part, fastvq.codebook.Codebook)):
        codebook.set_(torch.randn_like(codebook.embed) * 0.8**stage)
    batches = torch.randn(BATCHES, *shape)
    expected = layer.eval()(batches[0])[1]
    if package != "fastvq":
        theirs = getattr(pytest.importorskip(package), name)(**options)
        theirs.load_state_dict(layer.state_dict())
        layer = theirs.eval()
    assert torch.equal(layer(batches[0])[1], expected)
    return layer, batches


def timed(benchmark, group, layer, call):
    """One round is `CALLS` calls."""
    start = copy.deepcopy(layer.state_dict())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark.group = f"{group}, {CALLS} calls"

    def calls():
        for _ in range(CALLS):
            call()

    try:
        benchmark.pedantic(calls, setup=lambda: layer.load_state_dict(start) and None, rounds=ROUNDS, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("package", PACKAGES)
class BenchSteps:
    def bench_training_step(self, benchmark, package, name):
        layer, batches = built(name, package)
        each = itertools.cycle([x.requires_grad_() for x in batches.unbind()])
        layer.train()

        def step():
            x = next(each)
            x.grad = None
            quantized, _, loss = layer(x)
            (quantized.sum() + loss.sum()).backward()

        timed(benchmark, f"training step of {name} on {LAYERS[name][1]}", layer, step)

    def bench_eval(self, benchmark, package, name):
        layer, batches = built(name, package)
        each = itertools.cycle(batches.unbind())
        with torch.no_grad():
            timed(benchmark, f"eval of {name} on {LAYERS[name][1]}", layer, lambda: layer(next(each)))

    def bench_decoding(self, benchmark, package, name):
        layer, batches = built(name, package)
        indices = layer(batches[0])[1]
        with torch.no_grad():
            group = f"decoding of {name} on {LAYERS[name][1]}"
            timed(benchmark, group, layer, lambda: layer.get_output_from_indices(indices))
