"""The triton backend as a whole: what it serves, and that none of its ops waits for the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvq
from fastvq import ops
from fastvq.backends import select as backends
from fastvq.backends import triton
from fastvq.backends.arithmetic import compute_dtype
from fastvq.kernels import accumulate, quantize

from ..cases import close
from . import models

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


class NoReads(TorchDispatchMode):
    """Mode in which a copy of a value to the host is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def calls(device):
    """Return the arguments of every op."""
    x, codebooks = torch.randn(20, 6, device=device), torch.randn(3, 30, 6, device=device)
    codebook, grad = codebooks[0], torch.randn(20, 6, device=device)
    indices = torch.randint(-1, 30, (20, 3), device=device)
    state = [codebook.clone(), torch.ones(30, device=device), codebook.clone(), *torch.ones(1, 30, device=device)]
    dtype = compute_dtype(x, codebook)
    options = {"gradient": "rotation", "commitment_weight": 0.5}
    one, three = (torch.ones(shape, dtype=dtype, device=device) for shape in ((), (3,)))
    return {
        "search": ((x, codebook), {}),
        "residual_search": ((x, codebooks), {}),
        "accumulate": ((x, indices[:, 0], 30), {}),
        "ema_update_": ((*state, codebook * 2), {"decay": 0.9, "eps": 1e-5}),
        "quantize_forward": ((x, codebook, indices[:, 0], True), {}),
        "quantize_backward": ((x, grad, indices[:, 0], grad, one), options),
        "residual_quantize_forward": ((x, codebooks, indices, True), {}),
        "residual_quantize_backward": ((x, codebooks, indices, grad, three), options),
    }


@pytest.mark.parametrize("op", [s.op for s in triton.SUPPORTS if not s.composed_of])
def test_same_as_the_specification_without_a_wait(op, device, monkeypatch):
    """The implementation itself runs under the mode, which sees no operation inside an op."""
    # On the CPU alone, indices are looked at to raise IndexError.
    for module in (accumulate, quantize):
        monkeypatch.setattr(module, "check_index_range", lambda *arguments: None)
    torch.manual_seed(0)
    arguments, options = calls(device)[op]
    with NoReads():
        actual = triton.implementation(op, device.type)(*arguments, **options)
    monkeypatch.undo()
    torch.manual_seed(0)
    expected_arguments, _ = calls(device)[op]
    with fastvq.use_backend("reference"):
        expected = getattr(ops, op)(*expected_arguments, **options)
    if op == "ema_update_":
        actual, expected = tuple(arguments[:3]), tuple(expected_arguments[:3])
    close(actual, expected)


def test_a_layer_trains(device):
    torch.manual_seed(0)
    layer = fastvq.VectorQuantize(8, 16, decay=0.9, threshold_ema_dead_code=1).to(device)
    twin = fastvq.VectorQuantize(8, 16, decay=0.9, threshold_ema_dead_code=1).to(device)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 30, 8, device=device)
    results = []
    for backend, quantizer in (("triton", layer), ("torch", twin)):
        torch.manual_seed(1)
        with fastvq.use_backend(backend):
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = quantizer(leaf)
            (quantized.square().sum() + loss.sum()).backward()
        results.append((quantized.detach(), indices, loss.detach(), leaf.grad, quantizer.codebook.detach()))
    close(*results)


@models.needs_interpreter
def test_the_interpreter_serves_the_cpu_on_request_alone():
    assert not triton.reasons(CPU)
    assert backends.automatic(CPU) == ("native", "torch")


def test_what_it_cannot_serve(monkeypatch):
    assert "run on cuda (NVIDIA, AMD), not on mps" in triton.reasons(MPS)[0]
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    assert "only in the interpreter, with TRITON_INTERPRET=1" in triton.reasons(CPU)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.reasons(CUDA) == ("no cuda device is available",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert triton.reasons(CUDA) == ("needs compute capability 8.0, this device has 7.5",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not triton.reasons(CUDA)
    monkeypatch.setattr(triton, "_missing", lambda: "triton isn't installed")
    assert triton.reasons(CUDA) == ("triton isn't installed",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.reasons(CUDA) == ("no cuda device is available", "triton isn't installed")  # all at once


def test_it_serves_a_gpu_by_itself(monkeypatch):
    backend = dataclasses.replace(backends.BACKENDS["triton"], reasons=lambda device: ())
    monkeypatch.setitem(backends.BACKENDS, "triton", backend)
    assert backends.choose("search", CUDA) == "triton"
    assert backends.choose("topk_search", torch.device("cuda")) == "torch"  # which it has not
