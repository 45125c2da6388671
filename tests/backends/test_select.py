"""Choice of the backend for a call: requests are met or fail with the reason, and a fallback says so, once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fastvq
from fastvq.backends import native, support
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
    backends.refresh()
    yield
    monkeypatch.undo()
    backends.refresh()


def chosen(device=CPU):
    return backends.choose("search", device)


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
    for name, reasons in (("triton", ("triton isn't installed",)), ("native", ())):
        backend = dataclasses.replace(backends.BACKENDS[name], reasons=lambda device, reasons=reasons: reasons)
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
    """Silently: that an op has no kernel is no fault of the machine."""
    monkeypatch.setattr(backends, "_said", set())
    for name in ("triton", "native"):
        backend = dataclasses.replace(backends.BACKENDS[name], reasons=lambda device: ())
        monkeypatch.setitem(backends.BACKENDS, name, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("sample", CUDA) == "torch"


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


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_requests_may_end_in_any_order(order):
    """As they do where several threads make them; the last one that has not ended is met."""
    before = chosen()
    names = ("torch", "reference", "torch")
    requests = [fastvq.use_backend(name) for name in names]
    for request in requests:
        request.__enter__()
    left = [0, 1, 2]
    for i in order:
        requests[i].__exit__(None, None, None)
        left.remove(i)
        assert chosen() == (names[left[-1]] if left else before)


def test_requests_of_two_threads():
    """A request holds in all threads, and none is left over when the one that began first ends first."""
    before, x = chosen(), torch.eye(4)
    began, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        began.wait()
        with fastvq.use_backend("reference"):
            seen.append(chosen())
            leave.set()
            ended.wait()
            seen.append(chosen())

    ended = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    with fastvq.use_backend("torch"):
        began.set()
        leave.wait()
        assert chosen() == "reference"
    ended.set()
    thread.join()
    assert seen == ["reference", "reference"]
    assert chosen() == before
    assert torch.equal(fastvq.search(x, x), torch.arange(4))


@needs_native
def test_requests_while_other_threads_search():
    """Neither the choice nor the kernels that serve directly are torn: every answer is right, every request ends."""
    x, codes, stop, wrong = torch.randn(3, 4), torch.randn(9, 4), threading.Event(), []
    expected = fastvq.search(x, codes)

    def search():
        while not stop.is_set():
            if not torch.equal(fastvq.search(x, codes), expected):
                wrong.append(1)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(200):
        with fastvq.use_backend(("torch", "native")[i % 2]):
            fastvq.search(x, codes)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert backends.requested() is None


@needs_native
def test_the_choice_is_cached_until_a_request(monkeypatch):
    x, choices = torch.randn(3, 2, 4), []
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda *key: choices.append(key[0]) or choose(*key))
    for _ in range(3):
        fastvq.ops.binary_assign_forward(x, None, scale=1.0, floor=0.0)  # torch operations, by the choice in Python
    assert len(choices) <= 1
    choices.clear()
    with fastvq.use_backend("torch"):
        for _ in range(3):
            fastvq.search(x[0], x[0])
    assert choices == ["search"]


@needs_native
@pytest.mark.parametrize("run", ["compiled", "exported"])
def test_a_traced_program_meets_a_request_made_when_it_runs(run, monkeypatch):
    from fastvq.backends.torch import search

    layer = fastvq.VectorQuantize(4, 8).eval()
    x = torch.randn(2, 3, 4)
    if run == "compiled":
        torch._dynamo.reset()
        program = torch.compile(layer, fullgraph=True, backend="aot_eager")
    else:
        program = torch.export.export(layer, (x,)).module()
    expected = program(x)[1]
    entered = []
    rows = search._search_rows
    monkeypatch.setattr(search, "_search_rows", lambda *a: (entered.append(1), rows(*a)))
    assert torch.equal(program(x)[1], expected)
    assert not entered
    with fastvq.use_backend("torch"):
        assert torch.equal(program(x)[1], expected)
    assert entered
    unfit = dataclasses.replace(backends.BACKENDS["triton"], reasons=lambda device: ("unfit",))
    monkeypatch.setitem(backends.BACKENDS, "triton", unfit)
    with fastvq.use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was requested for search.*unfit"):
        program(x)


def test_errors_of_a_requested_backend_keep_their_class(backend):
    """The compiled library stands between the op and Python, and an exception does not pass through it."""
    x = torch.randn(3, 4)
    with fastvq.use_backend(backend):
        with pytest.raises(IndexError, match=r"^indices: must lie in \[-1, 5\), got 9"):
            fastvq.accumulate(x, torch.tensor([0, 9, 1]), 5)
        with pytest.raises(ValueError, match=r"^codebook: must have the dimension of x"):
            fastvq.search(x, x[:, :2])
        with pytest.raises(TypeError, match=r"^x: must be float32"):
            fastvq.search(x.int(), x)
        # An error that nobody asked about isn't taken for that of a later call.
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.fastvq.accumulate(x, torch.tensor([0, 9, 1]), 5)
        with pytest.raises(ValueError, match=r"^metric: must be 'l2' or 'dot'"):
            fastvq.search(x, x, metric="cosine")


def test_importing_fastvq_loads_no_backend():
    code = (
        "import sys, fastvq; print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton' or"
        " m.startswith(('fastvq.kernels', 'fastvq.backends.torch', 'fastvq.backends.reference'))));"
        "print('_native.so' in open('/proc/self/maps').read() if sys.platform == 'linux' else False)"
    )
    assert python(code).stdout == "[]\nFalse\n"


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
        backends.choose("search", device)


def test_no_backend_for_a_device():
    with pytest.raises(RuntimeError, match=r"no backend can serve search on mps: triton: .*; torch: .*float64"):
        backends.choose("search", MPS)


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
    assert "is of another version, without binary_assign_forward: install fastvq again" in reason


def test_the_environment_chooses():
    code = "from fastvq.backends.select import info; print(info()['requested'], end='')"
    assert python(code, FASTVQ_BACKEND="reference").stdout == "reference"


@needs_native
def test_a_tier_that_the_instruction_set_lacks():
    """A choice that can't be met is an error, asked for by name or not; the torch backend has nothing to do with it."""
    code = "import torch, fastvq; x = torch.eye(3); print(fastvq.search(x, x).tolist())"
    lacking = {"FASTVQ_ISA": "portable", "FASTVQ_TIER": "int16"}
    run = python(code, **lacking)
    assert "FASTVQ_TIER=int16: the instruction set portable has no int16 tier" in run.stderr
    run = python(code, **lacking, FASTVQ_BACKEND="native")
    assert "backend 'native' was requested for search but can't serve it: FASTVQ_TIER=int16" in run.stderr
    assert python(code, **lacking, FASTVQ_BACKEND="torch").stdout == "[0, 1, 2]\n"


def test_empty_environment_variables_ask_for_nothing():
    code = "import torch, fastvq; x = torch.eye(3); print(fastvq.search(x, x).tolist())"
    run = python(code, FASTVQ_ISA="", FASTVQ_BACKEND="")
    assert (run.stdout, run.stderr) == ("[0, 1, 2]\n", "")


def test_info_is_json_and_readable():
    info = backends.info()
    assert json.loads(json.dumps(info)) == info
    assert info["fastvq"] == fastvq.__version__
    assert set(info["devices"]["cpu"]) == set(backends.BACKENDS)
    assert set(info["ops"]["cpu"]) == set(support.OPS)
    text = backends.format_info(info)
    assert "backends on cpu:" in text
    assert text.count("chosen automatically") == 1
    assert "own f32 f16 bf16" in text or not native.instruction_set()
    assert "native: it has no binary_assign_forward" in text


def test_info_without_the_library(no_native):
    info = backends.info()
    assert info["instruction_set"] is None
    assert info["devices"]["cpu"]["native"].startswith("not built")
    assert "torch      available, chosen automatically" in backends.format_info(info)


@needs_native
def test_the_message_behind_the_library_has_no_second_type():
    """A compiled graph calls the op itself, so that nothing puts the exception of Python back in its place."""
    native.instruction_set()
    x = torch.randn(5, 3)
    with fastvq.use_backend("torch"):
        with pytest.raises(RuntimeError, match=r"^codebook: must have the dimension of x") as found:
            torch.ops.fastvq.search(x, x[:, :2])
        assert not str(found.value).startswith("ValueError")
    with fastvq.use_backend("triton"), pytest.raises(RuntimeError, match=r"^backend 'triton' was requested for topk"):
        torch.ops.fastvq.topk_search(x, x, 2)
