from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastvq.backends import native

from .cases import BACKENDS

# The same examples at every run; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _defaults():
    """Every test starts from one seed and leaves the process-wide settings as they were."""
    torch.manual_seed(0)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn, as a name. Serving fails loudly where it can't: only a build without native may skip."""
    if request.param == "native" and not native.build_record()["built"]:
        pytest.skip(f"native backend: {native.build_record()['reason']}")
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Make the torch backend take several tiles and chunks."""
    monkeypatch.setattr("fastvq.backends.torch.search.TILE_CODES", 13)
    monkeypatch.setattr("fastvq.backends.torch.search.tile_elements", lambda device: 13 * 12)
