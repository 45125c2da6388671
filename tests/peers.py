"""A quantizer beside vector_quantize_pytorch's: what their tests share."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastvq

from .cases import GRADIENT_TOLERANCE, close, flags_as_numbers

vqp = pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")


def pair(name, *args, seed=0, **options):
    """Return fastvq's quantizer and its peer from equal seeds, in the same state, each loaded from the other's."""
    torch.manual_seed(seed)
    theirs = getattr(vqp, name)(*args, **options)
    torch.manual_seed(seed)
    ours = getattr(fastvq, name)(*args, **options)
    late = {key for key in ours.state_dict() if key.endswith((".batch_mean", ".batch_variance"))}
    assert [key for key in ours.state_dict() if key not in late] == list(theirs.state_dict())
    for key, value in flags_as_numbers(theirs.state_dict()).items():
        mine = ours.state_dict()[key]
        assert (mine.shape, mine.dtype) == (value.shape, value.dtype), key
        if "codebook_mean" not in key and "codebook_variance" not in key:  # uninitialized there
            assert torch.equal(mine, value), key
    # Theirs has no statistics of a batch before the first one, and cannot load any.
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in late}, strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def flatten(output):
    """Return the tensors of nested tuples."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output for tensor in flatten(part)]


def assert_same_outputs(ours, theirs, tolerance=None):
    ours, theirs = flatten(ours), flatten(theirs)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        close(mine.detach(), other.detach(), tolerance=tolerance)


def assert_same_step(ours, theirs, x, seed=0, tolerance=None, **forward):
    """Compare outputs, gradients of x and parameters, and the state after one step of both with equal seeds.

    `tolerance` is that of the gradients, and of the outputs where they need another than usual.
    """
    outputs, grads = [], []
    for module in (ours, theirs):
        torch.manual_seed(seed)
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        output = module(leaf, **forward)
        outputs.append(output)
        differentiable = [t for t in flatten(output) if t.requires_grad]
        if differentiable:
            weights = torch.Generator().manual_seed(1)
            sum((t * torch.randn(t.shape, generator=weights)).sum() for t in differentiable).backward()
        named = [("x", leaf.grad), *((name, p.grad) for name, p in module.named_parameters())]
        grads.append({name: None if grad is None else grad.clone() for name, grad in named})
    assert_same_outputs(*outputs, tolerance)
    for name, theirs_grad in grads[1].items():
        mine = grads[0][name]
        if theirs_grad is None or mine is None:
            assert theirs_grad is None or not theirs_grad.any(), name
            assert mine is None or not mine.any(), name
        else:
            close(mine, theirs_grad, tolerance=tolerance or GRADIENT_TOLERANCE, name=name)
    for name, value in flags_as_numbers(theirs.state_dict()).items():
        close(ours.state_dict()[name], value, name=name)
    return outputs[0]


def assert_travels(module, x, **forward):
    """deepcopy, pickle, a state_dict round trip and inference_mode give the same outputs in eval."""
    module.eval()
    expected = flatten(module(x, **forward))
    fresh = copy.deepcopy(module)
    for value in fresh.state_dict().values():
        value.zero_()
    fresh.load_state_dict(module.state_dict(), strict=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        for mine, value in zip(flatten(other(x, **forward)), expected, strict=True):
            assert torch.equal(mine, value)
    with torch.inference_mode():
        for mine, value in zip(flatten(module(x, **forward)), expected, strict=True):
            assert torch.equal(mine, value)


def assert_compiles(module, x, **forward):
    """Assert that a training step in one graph gives the same results as without."""
    torch.compiler.reset()
    compiled = copy.deepcopy(module)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    results = []
    for run, owner in ((module, module), (step, compiled)):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        output = flatten(run(leaf, **forward))
        sum(t.sum() for t in output if t.requires_grad).backward()
        results.append(
            [*output, leaf.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in owner.parameters())]
        )
        results[-1] += [b for _, b in owner.named_buffers()]
    for plain, traced in zip(*results, strict=True):
        close(traced.detach(), plain.detach())
