"""No N x K matrix: the peak memory of a training step, measured in a process that has done nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

N = K = 8192
D = 64
LIMIT_MB = 40

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("needs Linux's /proc/self/clear_refs to restart the peak", allow_module_level=True)

MEASURE = """
import re, sys
import torch, fastvq

n, k, d = map(int, sys.argv[1:4])

def status(field):
    return int(re.search(field + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3

def step(layer, x):
    results = layer(x)
    sum(r.square().mean() for r in results if isinstance(r, torch.Tensor) and r.requires_grad).backward()

def layer(k):
    return fastvq.{kind}

small, measured = layer(16), layer(k)
step(small, torch.randn(16, small.dim, requires_grad=True))
x = torch.randn(n, measured.dim, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(measured, x)
{also}
print(status("VmHWM") - before)
"""


VECTOR_QUANTIZE = "VectorQuantize(d, k, threshold_ema_dead_code=2, {options})"


def peak_mb(backend, kind, also=""):
    command = [sys.executable, "-c", MEASURE.format(kind=kind, also=also), str(N), str(K), str(D)]
    # glibc then returns every larger block at once: what is measured is what is alive, not the holes in between.
    environment = os.environ | {"FASTVQ_BACKEND": backend, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.parametrize(
    "options", ["", "use_cosine_sim=True", "learnable_codebook=True", "kmeans_init=True, kmeans_iters=1"]
)
def test_training_step(backend, options):
    assert peak_mb(backend, VECTOR_QUANTIZE.format(options=options)) < LIMIT_MB


@pytest.mark.parametrize("kind", ["SimVQ(d, k)", "LFQ(codebook_size=k, commitment_loss_weight=1.0)"])
def test_training_step_of_others(backend, kind):
    assert peak_mb(backend, kind) < LIMIT_MB


@pytest.mark.parametrize(
    "kind",
    [
        "FSQ([16, 16, 32], dim=d)",
        "ResidualFSQ(levels=[16, 16, 32], num_quantizers=2, dim=d)",
        "FSP([16, 16, 32], dim=d)",
        "LatentQuantize([16, 16, 32], d)",
    ],
)
def test_training_step_of_scalar_quantizers(kind):
    assert peak_mb("torch", kind) < LIMIT_MB


def test_the_measurement_sees_a_matrix():
    matrix_mb = N * K * 4 / 1e6
    assert matrix_mb > 6 * LIMIT_MB
    assert (
        peak_mb("torch", VECTOR_QUANTIZE.format(options=""), also="distances = x.detach() @ measured.codebook.T")
        > matrix_mb
    )
