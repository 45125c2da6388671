"""Every option of `VectorQuantize` beside vector_quantize_pytorch's, over training steps: outputs, losses, gradients,
state, checkpoints both ways."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fastvq

from ..cases import close, generator

vqp = pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")

DIM, SIZE = 8, 20
SGD = functools.partial(torch.optim.SGD, lr=0.3)


def batch(*shape, seed=0):
    return torch.randn(shape or (3, 15, DIM), generator=generator(seed))


def pair(**options):
    """fastvq's layer and its peer, in the same state."""
    torch.manual_seed(0)
    theirs = vqp.VectorQuantize(DIM, SIZE, **options)
    ours = fastvq.VectorQuantize(DIM, SIZE, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def linear_bridge():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())


HEADS = {
    "heads": {"heads": 2, "codebook_dim": 4},
    "separate heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "projected heads": {"heads": 3, "codebook_dim": 5},
    "separate projected heads": {"heads": 3, "codebook_dim": 5, "separate_codebook_per_head": True},
    "cosine heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "use_cosine_sim": True},
}
OPTIONS = {
    **HEADS,
    "layer norm": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "layer norm unprojected": {"layernorm_after_project_in": True},
    "video": {"accept_3d_fmap": True},
    "video heads": {"accept_3d_fmap": True, **HEADS["separate projected heads"]},
    "orthogonal": {"orthogonal_reg_weight": 3.0},
    "orthogonal, used codes": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal, learnable": {"orthogonal_reg_weight": 3.0, "learnable_codebook": True, "ema_update": False},
    "orthogonal heads": {"orthogonal_reg_weight": 3.0, **HEADS["separate heads"]},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9, "directional_reparam_variance": 0.1},
    "in place": {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": SGD},
    "in place heads": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": SGD,
        **HEADS["separate heads"],
    },
    "affine": {"affine_param": True},
    "affine decays": {"affine_param": True, "affine_param_batch_decay": 0.5, "affine_param_codebook_decay": 0.3},
    "affine, learnable": {"affine_param": True, "learnable_codebook": True, "ema_update": False},
    "affine heads": {"affine_param": True, **HEADS["separate heads"]},
    "not routed": {"route_gradients_to_input": False},
    "not routed, learnable": {"route_gradients_to_input": False, "learnable_codebook": True, "ema_update": False},
    "manual": {"manual_ema_update": True},
    "no sync": {"sync_codebook": False, "sync_kmeans": False},
    "learnable heads": {"learnable_codebook": True, "ema_update": False, **HEADS["projected heads"]},
}
INPUTS = {"video": (2, DIM, 2, 3, 4), "video heads": (2, DIM, 2, 3, 4)}


def run(module, x, seed, **forward):
    """(results, gradients) of a training step; the seed is that of what the step draws."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    quantized, indices, loss, breakdown = module(x, return_loss_breakdown=True, **forward)
    weights = torch.randn(quantized.shape, generator=generator(seed + 100))
    total = (quantized * weights).sum() + loss.sum()
    if total.requires_grad:
        total.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    return (quantized.detach(), indices, loss.detach(), breakdown), {"x": x.grad, **grads}


def assert_equal_steps(ours, theirs, x, seed=0, **forward):
    mine, my_grads = run(ours, x, seed, **forward)
    other, their_grads = run(theirs, x, seed, **forward)
    assert torch.equal(mine[1], other[1])
    for a, b in zip((mine[0], mine[2]), (other[0], other[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert mine[3]._fields == other[3]._fields
    for name, a, b in zip(mine[3]._fields, mine[3], other[3], strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5, msg=name)
    their_x = their_grads.pop("x")
    my_x = my_grads.pop("x")
    if their_x is not None or my_x is not None:
        torch.testing.assert_close(my_x, torch.zeros_like(x) if their_x is None else their_x, rtol=1e-4, atol=1e-5)
    assert my_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(my_grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)
    assert_equal_state(ours, theirs)


def assert_equal_state(ours, theirs):
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype), name
        if name.endswith("embed_avg") and not ours.ema_update:
            continue  # theirs moves it for nothing, where codes are revived
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", OPTIONS)
def test_training(kind):
    ours, theirs = pair(**OPTIONS[kind])
    for seed in range(4):
        assert_equal_steps(ours, theirs, batch(*INPUTS.get(kind, ()), seed=seed), seed)


@pytest.mark.parametrize("kind", OPTIONS)
def test_eval_decoding_and_checkpoints_both_ways(kind):
    ours, theirs = pair(**OPTIONS[kind])
    x = batch(*INPUTS.get(kind, ()))
    run(ours, x, 0)
    torch.manual_seed(2)
    theirs = vqp.VectorQuantize(DIM, SIZE, **OPTIONS[kind])
    if "affine" in kind:  # theirs can't load what it saved, before it has seen a batch
        theirs(x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    if "affine" in kind:  # theirs follows the batch in eval too
        theirs._codebook.update_affine = lambda *_, **__: None
    (quantized, indices, loss), (expected, expected_indices, expected_loss) = ours(x), theirs(x)
    assert torch.equal(indices, expected_indices)
    close(quantized, expected.detach())
    assert loss.item() == expected_loss.item() == 0
    assert torch.equal(ours.encode(x), indices)
    close(ours.get_output_from_indices(indices), quantized)
    if "affine" not in kind and kind not in (
        "heads",
        "projected heads",
        "learnable heads",
    ):  # theirs decodes these otherwise
        close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
