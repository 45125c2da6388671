"""On a GPU (`pytest -m gpu`): exact at full size, without a wait, in CUDA graphs, on two streams, in little memory."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.backends import environment
from fastvq.kernels import launch

from ..cases import around, generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is available"),
]

SHAPES = [
    (65536, 1024, 64),
    (65536, 8192, 64),
    (65536, 16384, 8),
    (16384, 8192, 256),
    (8192, 65536, 16),
    (1, 2048, 256),
]


def vectors(shape, spread=0.3):
    n, k, d = shape
    g = generator()
    codebook = torch.randn(k, d, generator=g)
    return around(codebook, n, spread, g), codebook


@pytest.fixture
def native():
    """Return the native backend's indices, which its own tests compare with the specification."""
    return lambda x, codebook: fastvq.search(x.cpu(), codebook.cpu())


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_at_full_size(shape, dtype, spread, native):
    x, codebook = (t.to("cuda", dtype) for t in vectors(shape, spread))
    with fastvq.use_backend("triton"):
        assert torch.equal(fastvq.search(x, codebook).cpu(), native(x, codebook))


def test_offsets_beyond_32_bits():
    """2^31 elements and more, of rows that are easy to check: each is a code."""
    rows, dim = 2**24 + 5, 128
    if torch.cuda.mem_get_info()[0] < rows * dim * 2 * 2.5:
        pytest.skip("needs 11 GB of free GPU memory")
    codebook = torch.randn(64, dim, device="cuda", dtype=torch.bfloat16)
    expected = torch.randint(64, (rows,), device="cuda")
    with fastvq.use_backend("triton"):
        assert torch.equal(fastvq.search(codebook[expected], codebook), expected)


def test_no_wait():
    x, codebook = (t.cuda() for t in vectors((4096, 512, 32)))
    layer = fastvq.VectorQuantize(32, 512, threshold_ema_dead_code=2).cuda()
    layer(x[None].requires_grad_())
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastvq.search(x, codebook)
        quantized, _, loss = layer(x[None])
        (quantized.sum() + loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    x, codebook = (t.cuda() for t in vectors((4096, 512, 32)))
    fastvq.search(x, codebook)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fastvq.search(x, codebook)
    for seed in (1, 2):
        x.copy_(torch.randn(x.shape, generator=generator(seed)))
        graph.replay()
        assert torch.equal(captured, fastvq.search(x, codebook))


def test_two_streams():
    problems = [tuple(t.cuda() for t in vectors((30000, 1024, 32), spread)) for spread in (0.1, 3.0)]
    expected = [fastvq.search(*problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(20):
        results = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(fastvq.search(*problem))
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_memory():
    """Less than a tenth of N K float32, which is 256 MB here."""
    x, codebook = (t.cuda() for t in vectors((8192, 8192, 64)))
    fastvq.search(x, codebook)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastvq.search(x, codebook)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 25e6


def test_repeatable():
    x, codebook = (t.cuda() for t in vectors((65536, 1024, 64)))
    indices = fastvq.search(x, codebook)
    sums = [fastvq.ops.accumulate(x, indices, 1024) for _ in range(3)]
    assert all(torch.equal(one[1], sums[0][1]) for one in sums)


def test_autotuning(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "setting", {"FASTVQ_AUTOTUNE": "1"}.get)
    x, codebook = (t.cuda() for t in vectors((16384, 2048, 64)))
    tuned = fastvq.search(x, codebook)
    assert launch.cache_file().exists()
    monkeypatch.undo()
    assert torch.equal(tuned, fastvq.search(x, codebook))


def test_compiled_training_step():
    layer = fastvq.VectorQuantize(32, 512, threshold_ema_dead_code=2).cuda()
    step = torch.compile(lambda x: layer(x), fullgraph=True)
    x = torch.randn(8, 256, 32, device="cuda", requires_grad=True)
    quantized, indices, loss = step(x)
    (quantized.sum() + loss).backward()
    assert x.grad is not None
    assert indices.shape == (8, 256)
