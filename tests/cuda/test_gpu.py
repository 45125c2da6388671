"""The CUDA library on a GPU (`pytest -m gpu`): exact, without a wait, in CUDA graphs, on other streams."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.backends import native, reference

from ..cases import ADVERSARIAL, DTYPES, METRICS, close, generator

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(native.reasons(CUDA)), reason="; ".join(native.reasons(CUDA)) or "none"),
]

# One for each of the ways of a search, with rests, and some as large as they are used.
SHAPES = [(5, 9, 3), (64, 300, 33), (70, 500, 3), (700, 1000, 8), (600, 999, 16), (500, 700, 33), (300, 400, 130)]
LARGE = [
    (65536, 16384, 3),
    (65536, 16384, 8),
    (65536, 16384, 16),
    (65536, 8192, 64),
    (16384, 8192, 256),
    (20000, 4096, 512),
    (2000, 1000, 700),
    (4096, 8192, 1024),
    (1, 2048, 256),
]


@pytest.fixture(autouse=True)
def _native():
    with fastvq.use_backend("native"):
        yield


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("data", ADVERSARIAL)
def test_adversarial_data(data, metric):
    for shape in SHAPES:
        x, codebook = ADVERSARIAL[data](*shape, generator())
        found = fastvq.search(x.cuda(), codebook.cuda(), metric=metric).cpu()
        assert torch.equal(found, reference.search(x, codebook, metric=metric)), shape


@pytest.mark.parametrize("data", ["clustered", "gaussian"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape, data):
    x, codebook = ADVERSARIAL[data](*shape, generator())
    assert torch.equal(fastvq.search(x.cuda(), codebook.cuda()).cpu(), fastvq.search(x, codebook))


@pytest.mark.parametrize("path", ["few", "cores", "matrix", "three_products", "define"])
def test_each_path(path, monkeypatch):
    for shape in [(300, 999, 16), (300, 700, 3), (257, 300, 5)]:
        x, codebook = ADVERSARIAL["gaussian"](*shape, generator())
        monkeypatch.setenv("FASTVQ_CUDA_PATH", path)
        assert torch.equal(fastvq.search(x.cuda(), codebook.cuda()).cpu(), reference.search(x, codebook)), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_heads_and_layouts(dtype):
    g = generator()
    x, codebook = torch.randn(3, 200, 24, generator=g).to(dtype), torch.randn(3, 150, 24, generator=g).to(dtype)
    expected = reference.search(x, codebook)
    assert torch.equal(fastvq.search(x.cuda(), codebook.cuda()).cpu(), expected)
    strided = torch.stack([x, x], -1).cuda()[..., 0]
    assert torch.equal(fastvq.search(strided, codebook.cuda()).cpu(), expected)


@pytest.mark.parametrize(
    "shape", [(1, 8, 2048, 256), (75, 32, 1024, 8), (128, 4, 500, 33), (3000, 4, 500, 64)], ids=str
)
def test_residual_search(shape):
    n, q, k, d = shape
    g = generator()
    x, codebooks = (
        torch.randn(n, d, generator=g),
        torch.randn(q, k, d, generator=g) * 0.5 ** torch.arange(q)[:, None, None],
    )
    assert torch.equal(fastvq.residual_search(x.cuda(), codebooks.cuda()).cpu(), fastvq.residual_search(x, codebooks))


def test_accumulate_and_update():
    g = generator()
    for n, k, d in [(1, 1, 1), (5000, 300, 7), (100_000, 70_000, 2), (100_000, 3, 64)]:
        x, indices = torch.randn(n, d, generator=g), torch.randint(-1, k, (n,), generator=g)
        expected = reference.accumulate(x, indices, k)
        actual = fastvq.accumulate(x.cuda(), indices.cuda(), k)
        assert torch.equal(actual[0].cpu(), expected[0])
        close(actual[1].cpu(), expected[1])
        again = fastvq.accumulate(x.cuda(), indices.cuda(), k)
        assert torch.equal(actual[1], again[1])
        state = torch.randn(k, d, generator=g), torch.rand(k, generator=g), torch.randn(k, d, generator=g)
        on_device = [t.cuda() for t in state]
        fastvq.ema_update_(*on_device, *actual, decay=0.9, eps=1e-5)
        reference.ema_update_(*state, *(t.cpu() for t in actual), decay=0.9, eps=1e-5)
        close(tuple(t.cpu() for t in on_device), state)


def test_min_distance():
    g = generator()
    for dtype in DTYPES:
        for n, m, d in [(1, 1, 1), (5000, 3, 7), (100_000, 1, 64), (300, 2, 1000)]:
            x, codes = torch.randn(n, d, generator=g).to(dtype), torch.randn(m, d, generator=g)
            expected = 2 * d * torch.rand(n, generator=g)
            found = expected.cuda()
            reference.min_distance_(expected, x, codes)
            fastvq.min_distance_(found, x.cuda(), codes.cuda())
            torch.testing.assert_close(found.cpu(), expected, rtol=2.0**-23, atol=0)


def lowered(x, c):
    distances = torch.full((len(x),), 50.0, device=x.device)
    fastvq.min_distance_(distances, x, c[:2])
    return distances


CALLS = {
    "search, few rows": lambda x, c: fastvq.search(x[:30], c),
    "search": lambda x, c: fastvq.search(x, c),
    "search, small vectors": lambda x, c: fastvq.search(x[:, :8].contiguous(), c[:, :8].contiguous()),
    "residual_search, few rows": lambda x, c: fastvq.residual_search(x[:30], c[None]),
    "residual_search": lambda x, c: fastvq.residual_search(x, c[None]),
    "min_distance_": lowered,
    "accumulate": lambda x, c: fastvq.accumulate(x, torch.arange(len(x), device=x.device) % len(c), len(c)),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_wait_and_cuda_graph(call):
    x, codebook = (t.cuda() for t in ADVERSARIAL["gaussian"](4096, 512, 32, generator()))
    expected = CALLS[call](x, codebook)
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[call](x, codebook)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CALLS[call](x, codebook)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)


def test_two_streams():
    x, codebook = (t.cuda() for t in ADVERSARIAL["gaussian"](20000, 2000, 48, generator()))
    expected = fastvq.search(x, codebook)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(fastvq.search(x, codebook))
    torch.cuda.synchronize()
    assert all(torch.equal(found, expected) for found in results)
