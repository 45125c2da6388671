"""Settings of a test run, what every test starts from, and the fixture `backend`."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
from pathlib import Path

# Before torch is imported: a graph cached by an earlier fastvq calls ops by schemas that they no longer have.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastvq.backends import native

from .cases import BACKENDS

# Decoded images go to a folder of this run, also those of processes that tests start.
_CACHE = tempfile.TemporaryDirectory(prefix="fastvq-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Ctrl-C is tested too. A shell starts a background process with SIGINT ignored, and Python then leaves it so.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test that runs on a GPU needs hypothesis, and a machine with one may lack it.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    # The same examples at every run; HYPOTHESIS_PROFILE=explore looks for new ones.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
    hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# Folders and files that `make check` leaves out: they compile, train, emulate GPUs, start processes or measure.
SLOW = (
    "bench",
    "cli",
    "compat",
    "cpu",
    "cuda",
    "demo",
    "kernels",
    "modalities",
    "models",
    "runs",
    "training",
    "backends/test_bound.py",
    "backends/test_native.py",
    "backends/test_tiers.py",
    "coding/test_codec.py",
    "coding/test_learned.py",
    "ops/test_registry.py",
    "quantizers/test_compiled_options.py",
    "quantizers/test_contexts.py",
    "quantizers/test_export.py",
    "quantizers/test_memory.py",
    "test_distributed.py",
    "test_docs.py",
    "test_examples.py",
    "test_import.py",
    "test_paths.py",
    "test_sequences.py",
    "test_onnx.py",
)
LONGEST = (
    "cpu/test_builds.py",
    "cuda/test_mutants.py",
    "cuda/test_search.py",
    "kernels/test_search.py",
    "cuda/test_build.py",
    "cpu/test_leaks.py",
    "test_sequences.py",
    "training/test_ranks.py",
    "cli/test_demo.py",
)
"""Files that begin first, so that no worker is left alone with one of them at the end."""
SLOW_WORDS = ("compile", "export", "instruction_set")
"""Tests with one of these words in their names are slow too."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the slow tests, before pytest applies `-m`, and let the longest files begin first."""
    root = Path(__file__).parent
    places = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    slow = [root / name for name in SLOW]
    for item in items:
        named = any(word in item.name for word in SLOW_WORDS)
        if named or any(item.path.is_relative_to(path) for path in slow):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _defaults():
    """Start every test from one seed, and restore the process-wide settings after it."""
    torch.manual_seed(0)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def _coarse_pictures():
    """Draw pictures with few dots: of a training of some steps, most of the time goes to their pixels."""
    from fastvq.runs import figures

    figures.DPI = 40


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Yield the name of each backend in turn. A backend that cannot serve fails the test, unless it was not built."""
    if request.param == "native" and not native.build_record()["built"]:
        pytest.skip(f"native backend: {native.build_record()['reason']}")
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Make the torch backend take several tiles and chunks."""
    monkeypatch.setattr("fastvq.backends.torch.search.TILE_CODES", 13)
    monkeypatch.setattr("fastvq.backends.torch.search.tile_elements", lambda device: 13 * 12)
