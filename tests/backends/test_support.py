"""Declarations: what a backend claims runs its own code, and what it does not claim is refused with the reason."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

import fastvq
from fastvq.backends import native, support, triton
from fastvq.backends import select as backends
from fastvq.backends.support import DTYPES, OPS, Backend, Support

from ..op_samples import sample_inputs

CPU = torch.device("cpu")
CALLS = {}
for name, arguments, options in sample_inputs():
    tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
    CALLS.setdefault((name, support.call_dtype(*tensors)), []).append((arguments, options))


def served():
    """Yield (backend, op, dtype) of every declaration for the CPU."""
    for backend in backends.BACKENDS.values():
        for s in backend.supports:
            for dtype in s.dtypes:
                if s.covers(CPU, dtype):
                    yield backend.name, s.op, dtype


def refused():
    claimed = set(served())
    everything = ((name, op, dtype) for name in backends.BACKENDS for op in OPS for dtype in DTYPES)
    return [one for one in everything if one not in claimed]


def call(op, arguments, options):
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    return getattr(fastvq.ops, op)(*copies, **options)


def sampled(claims):
    return [pytest.param(*claim, id="-".join(map(str, claim))) for claim in claims if claim[1:] in CALLS]


class Own:
    """Counts what enters the code of one backend, and forbids that of the others."""

    def __init__(self, name, monkeypatch):
        self.entered = []
        for other in ("torch", "reference"):
            package = importlib.import_module(f"fastvq.backends.{other}")
            for op, function in package.OPS.items():
                watched = self._count(function) if other == name else self._forbid(other, op)
                monkeypatch.setitem(package.OPS, op, watched)
        kernels, chosen = native.implementation, triton.implementation
        self._watch(monkeypatch, "native", kernels, name)
        self._watch(monkeypatch, "triton", chosen, name)

    def _watch(self, monkeypatch, which, implementation, name):
        watched = (
            (lambda op, device: self._count(implementation(op, device)))
            if which == name
            else (lambda op, device: self._forbid(which, op))
        )
        backend = dataclasses.replace(backends.BACKENDS[which], implementation=watched)
        monkeypatch.setitem(backends.BACKENDS, which, backend)

    def _count(self, function):
        def run(*args, **kwargs):
            self.entered.append(function)
            return function(*args, **kwargs)

        return run

    def _forbid(self, name, op):
        def run(*args, **kwargs):
            raise AssertionError(f"{op} is served by {name}")

        return run


@pytest.mark.parametrize(("name", "op", "dtype"), sampled(served()))
def test_what_is_claimed_runs_the_backends_own_code(name, op, dtype, monkeypatch):
    if reasons := backends.BACKENDS[name].reasons(CPU):
        pytest.skip("; ".join(reasons))
    own = Own(name, monkeypatch)
    with fastvq.use_backend(name):
        assert backends.choose(op, CPU, dtype) == name
        if name == "native":  # through the choice in Python, where calls can be counted
            native.serve_directly(False)
        for arguments, options in CALLS[op, dtype]:
            before = len(own.entered)
            call(op, arguments, options)
            assert len(own.entered) > before
    backends.refresh()


@pytest.mark.skipif(not native.build_record()["built"], reason="no native library was built")
@pytest.mark.parametrize("requested", [None, "native"])
@pytest.mark.parametrize(("name", "op", "dtype"), sampled(c for c in served() if c[0] == "native"))
def test_the_native_kernels_serve_without_python(name, op, dtype, requested, monkeypatch):
    call(op, *CALLS[op, dtype][0])  # the library is loaded
    own = Own("native", monkeypatch)
    if requested:
        with fastvq.use_backend(requested):
            call(op, *CALLS[op, dtype][0])
    else:
        backends.refresh()
        call(op, *CALLS[op, dtype][0])
    assert not own.entered


@pytest.mark.parametrize(("name", "op", "dtype"), sampled(refused()))
def test_what_is_not_claimed_is_refused_with_the_reason(name, op, dtype):
    reason = f"backend {name!r} was requested for {op} but can't serve it: (it has no|its) {op}"
    with fastvq.use_backend(name), pytest.raises(RuntimeError, match=reason):
        call(op, *CALLS[op, dtype][0])


def test_automatic_choice_falls_through_by_op_and_dtype():
    """To the torch backend, silently, where native lacks an op or a dtype of it."""
    for (op, dtype), samples in CALLS.items():
        has = any(s.op == op and s.covers(CPU, dtype) for s in native.SUPPORTS)
        expected = "native" if has and native.instruction_set() else "torch"
        assert backends.choose(op, CPU, dtype) == expected
        call(op, *samples[0])


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_every_op_is_declared_or_absent(name):
    backend = backends.BACKENDS[name]
    assert {s.op for s in backend.supports} <= set(OPS)
    if name in ("torch", "reference"):
        assert [s.op for s in backend.supports] == list(OPS)
        assert set(importlib.import_module(f"fastvq.backends.{name}").OPS) == set(OPS)
        assert all(s.dtypes == DTYPES for s in backend.supports)


def test_every_op_has_a_sample():
    assert {op for op, _ in CALLS} == set(OPS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"op": "lookup"}, "op: must be one of search, .* got 'lookup'"),
        ({"op": "search", "dtypes": ()}, r"dtypes: must be some of float32, .* got \(\)"),
        ({"op": "search", "dtypes": (torch.int64,)}, "dtypes: must be some of"),
        ({"op": "search", "composed_of": ("search",)}, "composed_of: search cannot be composed of itself"),
        ({"op": "search", "composed_of": ("scan",)}, "op: must be one of search, .* got 'scan'"),
    ],
)
def test_a_declaration_validates_itself(record, message):
    with pytest.raises(ValueError, match=message):
        Support(**record)


def test_two_declarations_may_not_cover_the_same_inputs():
    def backend(*supports):
        return Backend("twice", lambda device: (), supports, lambda op, device: None)

    half, single = (Support("search", dtypes=(dtype,)) for dtype in (torch.float16, torch.float32))
    backend(half, single, Support("search", devices=("cpu",), dtypes=(torch.float64,)))
    for other in (Support("search"), Support("search", devices=("cpu",))):
        with pytest.raises(ValueError, match="twice declares search twice for the same device and dtype"):
            backend(half, other)


def test_layers_train_on_native_where_native_has_their_ops():
    for layer in (
        fastvq.VectorQuantize(8, 16, threshold_ema_dead_code=1),
        fastvq.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16),
        fastvq.LFQ(codebook_size=16, dim=8, entropy_loss_weight=0.0),
        fastvq.FSQ([5, 5, 5], dim=8),
    ):
        with fastvq.use_backend("native"):
            quantized, *_ = layer(torch.randn(2, 10, 8, requires_grad=True))
            quantized.sum().backward()
    with fastvq.use_backend("native"), pytest.raises(RuntimeError, match="it has no binary_assign_forward"):
        fastvq.LFQ(codebook_size=16, dim=8)(torch.randn(2, 10, 8))
