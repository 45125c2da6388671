"""No N x K matrix: the peak memory of a training step, measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..cases import require_support

N = K = 8192
D = 64
LIMIT_MB = 40

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("needs Linux's /proc/self/clear_refs to restart the peak", allow_module_level=True)

# One process imports torch and the layers, which takes seconds, and measures each request in a fork of its own.
SERVER = """
import json, os, re, sys
import torch, fastvq.quantizers

n, d = map(int, sys.argv[1:3])

def status(field):
    return int(re.search(field + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3

def measure(layer, k, dim, forward, also):
    make, width, options = (eval(f"lambda k: {code}") for code in (layer, dim, f"dict({forward})"))

    def rows(n, k):
        return torch.randn(1, n, width(k), requires_grad=True)

    def step(layer, x):
        results = layer(x, **options(k))
        results = results if isinstance(results, tuple) else (results,)
        terms = [r.square().mean() for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
        if terms:
            sum(terms).backward()

    step(make(16), rows(16, 16))
    measured, x = make(k), rows(n, k)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    step(measured, x)
    exec(also)
    return status("VmHWM") - before

for line in sys.stdin:
    request = json.loads(line)
    backend = request.pop("backend")
    child = os.fork()
    if child == 0:
        with fastvq.use_backend(backend) if backend else torch.enable_grad():
            print(measure(**request), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("failed", flush=True)
"""


@pytest.fixture(scope="module")
def peak_mb():
    """Return a function that measures a training step in a process of its own."""
    # glibc then returns every larger block at once: what is measured is what is alive, not the holes in between.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SERVER, str(N), str(D)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as server:

        def measure(backend, layer, *, k=K, dim="d", forward="", also=""):
            request = {"backend": backend, "layer": layer, "k": k, "dim": dim, "forward": forward, "also": also}
            print(json.dumps(request), file=server.stdin, flush=True)
            return float(server.stdout.readline())

        yield measure
        server.stdin.close()


@pytest.mark.parametrize("options", ["", "use_cosine_sim=True", "learnable_codebook=True"])
def test_training_step(peak_mb, backend, options):
    assert peak_mb(backend, f"fastvq.VectorQuantize(d, k, threshold_ema_dead_code=2, {options})") < LIMIT_MB


def test_first_step_with_kmeans(peak_mb, backend):
    """With fewer codes, as k-means++ draws them one after the other; N x K would still be beyond the limit."""
    k = K // 4
    assert 4 * N * k / 1e6 > 1.5 * LIMIT_MB
    layer = "fastvq.VectorQuantize(d, k, threshold_ema_dead_code=2, kmeans_init=True, kmeans_iters=1)"
    assert peak_mb(backend, layer, k=k) < LIMIT_MB


# Left out: BinaryMapper, whose output is a vector of K for each row, and implicit neural codebooks, which take a net
# to every pair of row and code: these hold a chunk of them (fastvq/parts/implicit.py), but not in a test's time.
LAYERS = {
    # name: layer, dimension, arguments of forward
    "heads": ("fastvq.VectorQuantize(d, k, heads=4, codebook_dim=16, separate_codebook_per_head=True)", "d", ""),
    "affine": ("fastvq.VectorQuantize(d, k, affine_param=True)", "d", ""),
    "stochastic": ("fastvq.VectorQuantize(d, k, stochastic_sample_codes=True)", "d", ""),
    "cross entropy": ("fastvq.VectorQuantize(d, k, commitment_use_cross_entropy_loss=True)", "d", ""),
    "diversity": ("fastvq.VectorQuantize(d, k, codebook_diversity_loss_weight=0.1)", "d", ""),
    "orthogonal": ("fastvq.VectorQuantize(d, k, orthogonal_reg_weight=0.1)", "d", ""),
    "DiVeQ": ("fastvq.VectorQuantize(d, k, directional_reparam=True, threshold_ema_dead_code=1)", "d", ""),
    "topk": ("fastvq.VectorQuantize(d, k)", "d", "topk=4"),
    "residual": ("fastvq.ResidualVQ(dim=d, num_quantizers=2, codebook_size=k)", "d", ""),
    "shared": ("fastvq.ResidualVQ(dim=d, num_quantizers=2, codebook_size=k, shared_codebook=True)", "d", ""),
    "beam": ("fastvq.ResidualVQ(dim=d, num_quantizers=2, codebook_size=k, beam_size=2)", "d", ""),
    "grouped": ("fastvq.GroupedResidualVQ(dim=d, groups=2, num_quantizers=2, codebook_size=k)", "d", ""),
    "SimVQ": ("fastvq.SimVQ(d, k)", "d", ""),
    "residual SimVQ": ("fastvq.ResidualSimVQ(dim=d, num_quantizers=2, codebook_size=k)", "d", ""),
    "LFQ": ("fastvq.LFQ(codebook_size=k, entropy_loss_weight=0.1)", "k.bit_length() - 1", ""),
    "random projection": ("fastvq.RandomProjectionQuantizer(dim=d, codebook_size=k, codebook_dim=16)", "d", ""),
    "sequential": ("fastvq.Sequential(torch.nn.Identity(), fastvq.VectorQuantize(d, k))", "d", ""),
    "EvoLFQ": ("fastvq.EvoLFQ(torch.nn.Identity(), torch.nn.Identity(), dim=13)", "13", ""),
    "grouped LFQ": ("fastvq.GroupedResidualLFQ(dim=d, groups=2, codebook_size=k, num_quantizers=2)", "d", ""),
    "grouped FSQ": ("fastvq.GroupedResidualFSQ(dim=d, groups=2, levels=[8, 8, 8, 16], num_quantizers=2)", "d", ""),
    "residual LFQ": ("fastvq.ResidualLFQ(dim=d, codebook_size=k, num_quantizers=2)", "d", ""),
    "FSQ": ("fastvq.FSQ([8, 8, 8, 16])", "4", ""),
    "residual FSQ": ("fastvq.ResidualFSQ(dim=d, levels=[8, 8, 8, 16], num_quantizers=2)", "d", ""),
    "FSP": ("fastvq.FSP([16, 16, 32], dim=d)", "d", ""),
    "LatentQuantize": ("(lambda q: lambda x: q(x.mT))(fastvq.LatentQuantize([16, 16, 32], d))", "d", ""),
    "hierarchical": (
        "fastvq.HierarchicalVQ(dim=d, codebook_size=k, scales=(1, 64, 8192), channel_first=False, kmeans_iters=1)",
        "d",
        "",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_training_step_of_every_quantizer(peak_mb, name):
    layer, dim, forward = LAYERS[name]
    # These hold several codes or scales of each vector, or the mean probabilities of some positions.
    several = 2 if name in ("topk", "beam", "hierarchical", "diversity") else 1
    # Without a request, since native has no binary_assign: LFQ and its kin take that one from torch.
    assert peak_mb("", layer, dim=dim, forward=forward) < several * LIMIT_MB


def test_the_measurement_sees_a_matrix(peak_mb):
    matrix_mb = N * K * 4 / 1e6
    assert matrix_mb > 6 * LIMIT_MB
    layer = "fastvq.VectorQuantize(d, k)"
    peak = peak_mb("torch", layer, also="distances = x.detach() @ measured.codebook.T")
    assert peak > 0.9 * matrix_mb


@pytest.mark.parametrize(
    "results",
    [
        "fastvq.topk_search(x, e, 8)",
        "fastvq.sample(x[:2048], e, temperature=1.0, seed=torch.tensor(1))",
        "*fastvq.soft_assign(x, e, floor=1e-5)",
        "fastvq.cross_entropy(x, e, torch.zeros(len(x), dtype=torch.int64))",
        "fastvq.mean_assignment_entropy(x.view(2, -1, x.shape[1]), e)",
        "fastvq.soft_lookup(x, e, torch.zeros(len(x), dtype=torch.int64))",
        "*fastvq.binary_assign(x[:, :13], floor=1e-5)",
    ],
)
def test_streams(peak_mb, backend, results):
    require_support(backend, "binary_assign_forward" if "binary_assign" in results else "search")
    layer = f"(lambda e: lambda rows: (lambda x: (x.sum(), {results}))(rows[0]))(torch.randn(k, d, requires_grad=True))"
    tiles = 2 if backend == "torch" else 1  # torch operations hold several temporaries of a tile
    assert peak_mb(backend, layer) < tiles * LIMIT_MB
