"""Which backend serves a call: requests are met or fail with the reason, and a fallback says so, once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastvq
from fastvq.backends import native
from fastvq.backends import select as backends

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
needs_native = pytest.mark.skipif(not native.build_record()["built"], reason="no native library was built")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: ("", "not built: no C++ compiler found"))
    monkeypatch.setattr(backends, "_said", set())


def chosen(device=CPU):
    implementation = backends.select("search", device)
    return next(name for name, backend in backends.BACKENDS.items() if backend.ops["search"] is implementation)


@needs_native
def test_native_serves_the_cpu_by_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "native"


def test_torch_serves_a_gpu_that_triton_cannot(monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="without its triton backend, exact but slower: no cuda device is available"):
        assert chosen(CUDA) == "torch"


def test_native_serves_a_gpu_without_triton_and_says_that_nobody_has_tried_it(monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    for name, reason in (("triton", "triton isn't installed"), ("native", "")):
        backend = dataclasses.replace(backends.BACKENDS[name], unavailable=lambda device, reason=reason: reason)
        monkeypatch.setitem(backends.BACKENDS, name, backend)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert chosen(CUDA) == "native"
        assert chosen(CUDA) == "native"
    assert [str(one.message).partition(":")[0] for one in said] == [
        "fastvq runs without its triton backend, exact but slower",
        native.UNTRIED,
    ]


def test_operations_serve_what_has_no_cuda_kernel(monkeypatch):
    """Here on the meta device, which has none either."""
    monkeypatch.setattr(native, "quantize_forward", None)
    x, codebook = torch.empty(3, 2, device="meta"), torch.empty(4, 2, device="meta")
    quantized, _, _ = native.OPS["quantize_forward"](x, codebook, torch.empty(3, device="meta").long(), False)
    assert quantized.shape == x.shape


def test_every_backend_has_every_op():
    names = {tuple(sorted(backend.ops)) for backend in backends.BACKENDS.values()}
    steps = ("quantize_backward", "quantize_forward", "residual_quantize_backward", "residual_quantize_forward")
    binary = ("binary_assign_backward", "binary_assign_forward")
    searches = ("residual_search", "sample", "search")
    soft = ("soft_assign_backward", "soft_assign_forward")
    assert names == {("accumulate", *binary, "ema_update_", "min_distance_", *steps, *searches, *soft, "topk_search")}


def test_requests_nest_and_end():
    before = chosen()
    with fastvq.use_backend("torch"):
        assert chosen() == "torch"
        with fastvq.use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "torch"
    assert chosen() == before


def test_a_request_ends_with_an_exception():
    before = chosen()
    with pytest.raises(KeyError), fastvq.use_backend("reference"):
        raise KeyError
    assert chosen() == before


def test_an_unknown_name():
    with (
        pytest.raises(ValueError, match="name: must be one of native, triton, torch, reference, got 'cublas'"),
        fastvq.use_backend("cublas"),
    ):
        pass
    with fastvq.use_backend("torch"):
        assert chosen() == "torch"


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [("native", CUDA, "no cuda device is available"), ("torch", MPS, "no float64"), ("reference", MPS, "no float64")],
)
def test_a_request_never_falls_back(name, device, reason):
    with fastvq.use_backend(name), pytest.raises(RuntimeError, match=f"{name!r} was requested for search.*{reason}"):
        backends.select("search", device)


def test_no_backend_for_a_device():
    with pytest.raises(RuntimeError, match=r"no backend can serve search on mps: triton: .*; torch: .*float64"):
        backends.select("search", MPS)


def test_a_missing_library_is_said_once(no_native):
    x = torch.randn(5, 3)
    with pytest.warns(UserWarning, match="without its native backend, exact but slower: not built: no C"):
        first = fastvq.search(x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fastvq.search(x, x), first)
        assert torch.equal(first, torch.arange(5))


def test_a_missing_library_is_an_error_on_request(no_native):
    with fastvq.use_backend("native"), pytest.raises(RuntimeError, match="can't serve it: not built"):
        fastvq.search(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("record", [{"built": False, "reason": "left out"}, {"built": True}])
def test_why_the_library_is_missing(record, monkeypatch, tmp_path):
    """Left out of the build, or gone since: either way a reason, no exception."""
    monkeypatch.setattr(native, "build_record", lambda: record)
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    isa, reason = native._load.__wrapped__()
    assert isa == ""
    assert "left out" in reason or "doesn't load" in reason


@pytest.mark.skipif(not native.instruction_set(), reason="the native library wasn't built")
def test_a_library_of_another_version(monkeypatch):
    # An op of ours that the library doesn't have: torch operations serve it everywhere.
    monkeypatch.setattr(native, "KERNELS", (*native.KERNELS, "binary_assign_forward"))
    isa, reason = native._load.__wrapped__()
    assert isa == ""
    assert "is of another version, without binary_assign_forward. Build it again: install" in reason


def test_the_environment_chooses():
    code = "from fastvq.backends.select import info; print(info()['requested'], end='')"
    assert python(code, FASTVQ_BACKEND="reference").stdout == "reference"


def test_the_environment_names_an_unknown_backend():
    run = python("import fastvq", FASTVQ_BACKEND="fast")
    assert run.returncode != 0
    assert "ValueError: FASTVQ_BACKEND: must be one of native, triton, torch, reference, got 'fast'" in run.stderr


@needs_native
def test_an_unknown_instruction_set():
    """A choice that can't be met is an error, asked for by name or not; the torch backend has nothing to do with it."""
    code = "import torch, fastvq; x = torch.eye(3); print(fastvq.search(x, x).tolist())"
    run = python(code, FASTVQ_ISA="sse9")
    assert "RuntimeError: FASTVQ_ISA=sse9: unknown; portable" in run.stderr
    run = python(code, FASTVQ_ISA="sse9", FASTVQ_BACKEND="native")
    assert "RuntimeError: backend 'native' was requested for search but can't serve it: FASTVQ_ISA=sse9" in run.stderr
    assert python(code, FASTVQ_ISA="sse9", FASTVQ_BACKEND="torch").stdout == "[0, 1, 2]\n"


def test_empty_environment_variables_ask_for_nothing():
    code = "import torch, fastvq; x = torch.eye(3); print(fastvq.search(x, x).tolist())"
    run = python(code, FASTVQ_ISA="", FASTVQ_BACKEND="")
    assert (run.stdout, run.stderr) == ("[0, 1, 2]\n", "")


def test_info_is_json_and_readable():
    info = backends.info()
    assert json.loads(json.dumps(info)) == info
    assert info["fastvq"] == fastvq.__version__
    assert set(info["devices"]["cpu"]) == set(backends.BACKENDS)
    text = backends.format_info(info)
    assert "backends on cpu:" in text
    assert text.count("chosen automatically") == 1


def test_info_without_the_library(no_native):
    info = backends.info()
    assert info["instruction_set"] is None
    assert info["devices"]["cpu"]["native"].startswith("not built")
    assert "torch      available, chosen automatically" in backends.format_info(info)
