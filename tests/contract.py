"""Checks that hold for every quantizer; the tests of each layer call them with their own layers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cases import GRADIENT_TOLERANCE, close, flags_as_numbers, generator


def vectors(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=generator(seed))


def step(layer, x, **forward):
    """(results, gradient of x, gradients of the parameters) of a step from all results that are differentiable."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(3)
    results = layer(x, **forward)
    loss = sum(r.float().square().sum() + r.float().sum() for r in results if is_differentiable(r))
    loss.backward()
    return results, x.grad, {name: p.grad for name, p in layer.named_parameters()}


def is_differentiable(result):
    return isinstance(result, Tensor) and result.requires_grad


def assert_close(actual, expected, gradients=False):
    assert (actual is None) == (expected is None)
    if actual is None:
        return
    if isinstance(actual, dict):
        assert set(actual) == set(expected)
        for name in actual:
            assert_close(actual[name], expected[name], gradients)
    elif gradients:
        close(actual, expected, tolerance=GRADIENT_TOLERANCE)
    else:
        close(actual.detach(), expected.detach())


def assert_steps_agree(ours, theirs, x, **forward):
    """Results, gradients and state of fastvq's layer and of its peer."""
    ours_step, theirs_step = step(ours, x, **forward), step(theirs, x, **forward)
    assert len(ours_step[0]) == len(theirs_step[0])
    for one, other in zip(ours_step[0], theirs_step[0], strict=True):
        if isinstance(other, Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert_close(one, other)
    assert_close(ours_step[1], theirs_step[1], gradients=True)
    assert_close(ours_step[2], theirs_step[2], gradients=True)
    for name, value in flags_as_numbers(theirs.state_dict()).items():
        close(ours.state_dict()[name], value)


def assert_checkpoints_load_both_ways(ours, theirs):
    expected = theirs.state_dict()
    assert [(n, v.shape, v.dtype) for n, v in ours.state_dict().items()] == [
        (n, v.shape, v.dtype) for n, v in expected.items()
    ]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(expected, strict=True)


def assert_non_finite_rows_are_excluded(layer, x, axis=-1):
    """Assert that non-finite rows are treated like masked ones in results, gradients and statistics."""
    poisoned, mask = x.clone(), torch.ones(x.movedim(axis, -1).shape[:-1], dtype=torch.bool)
    for place, column, value in (((0, 1), 0, torch.nan), ((-1, 3), -1, torch.inf), ((-1, 0), 0, -torch.inf)):
        poisoned.movedim(axis, -1)[(*place, column)] = value
        mask[place] = False
    twin = copy.deepcopy(layer)
    results, x_grad, grads = step(layer, poisoned)
    expected, expected_x_grad, expected_grads = step(twin, x, mask=mask)
    for one, other in zip(results, expected, strict=True):
        assert_close(one, other)
    assert_close(x_grad, expected_x_grad)
    assert_close(grads, expected_grads)
    assert x_grad.isfinite().all()
    assert not x_grad.movedim(axis, -1)[~mask].any()
    assert x_grad.movedim(axis, -1)[mask].any()
    quantized, indices = results[:2]
    assert not quantized.movedim(axis, -1)[~mask].any()
    return mask, indices, twin


def assert_copies_go_on_alike(layer, x):
    layer(x)
    for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        other = copied(layer)
        for one, same in zip(step(layer, x)[0], step(other, x)[0], strict=True):
            if isinstance(one, Tensor):
                assert torch.equal(one, same)
        assert torch.equal(other.code_counts, layer.code_counts)


def assert_half_works(make, x, dtype):
    """Assert that the layer cast to half precision takes and returns it, and has finite gradients."""
    layer = make().to(dtype)
    results, x_grad, grads = step(layer, x.to(dtype))
    assert results[0].dtype == dtype == x_grad.dtype
    assert all(g is None or (g.isfinite().all() and g.dtype == dtype) for g in grads.values())
    return results


def assert_compiles(layer, x, backend="aot_eager", modes=(True, False), **forward):
    """One graph, in training and in eval, with the results of eager mode."""
    for training in modes:
        layer.train(training)
        twin = copy.deepcopy(layer)
        torch._dynamo.reset()
        compiled = torch.compile(twin, fullgraph=True, backend=backend)
        for _ in range(2):
            results, x_grad, grads = step(compiled, x, **forward)
            expected, expected_x_grad, expected_grads = step(layer, x, **forward)
            for one, other in zip(results, expected, strict=True):
                if isinstance(other, Tensor):
                    close(one, other)
            assert_close(x_grad, expected_x_grad, gradients=True)
            renamed = dict(zip(expected_grads, grads.values(), strict=True))
            assert_close(renamed, expected_grads, gradients=True)
        assert torch.equal(twin.code_counts, layer.code_counts)


def assert_inference_mode_works(layer, x):
    expected = layer.eval()(x)
    with torch.inference_mode():
        for one, other in zip(layer(x), expected, strict=True):
            if isinstance(other, Tensor):
                assert torch.equal(one, other)


def assert_exports(layer, x):
    """As a program for any batch size, in eval."""
    layer.eval()
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = torch.cat([x, x.flip(0)])
    for one, other in zip(program(more), layer(more), strict=True):
        if isinstance(other, Tensor):
            close(one, other)


def assert_checkpointing_changes_nothing(layer, x):
    """Activation checkpointing of either kind: the results, gradients and state of a step without it."""

    class Checkpointed(nn.Module):
        def __init__(self, use_reentrant):
            super().__init__()
            self.inner, self.use_reentrant = copy.deepcopy(layer), use_reentrant

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)

    wrapped = [Checkpointed(use_reentrant) for use_reentrant in (True, False)]
    results, x_grad, grads = step(layer, x)
    for module in wrapped:
        found, found_x_grad, found_grads = step(module, x)
        for one, other in zip(found, results, strict=True):
            if isinstance(other, Tensor):
                assert torch.equal(one, other)
        assert_close(found_x_grad, x_grad, gradients=True)
        assert_close({name.removeprefix("inner."): g for name, g in found_grads.items()}, grads, gradients=True)
        assert torch.equal(module.inner.code_counts, layer.code_counts)
        for name, value in layer.state_dict().items():
            assert torch.equal(module.inner.state_dict()[name], value)


def assert_traces_are_saved(layer, x):
    with torch.no_grad():
        traced = torch.jit.trace(layer.eval(), x, strict=False)
        stream = io.BytesIO()
        torch.jit.save(traced, stream)
        stream.seek(0)
        for one, other in zip(torch.jit.load(stream)(x), layer(x), strict=True):
            if isinstance(other, Tensor):
                assert torch.equal(one, other)


def assert_runs_in_onnxruntime(layer, x, path):
    """With equal indices."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from fastvq import onnx

    layer.eval()
    onnx.export(layer, x, path)
    session = onnxruntime.InferenceSession(path)
    (name,) = (given.name for given in session.get_inputs())
    for one, other in zip(session.run(None, {name: x.numpy()}), layer(x), strict=True):
        close(torch.from_numpy(one), other.detach())
