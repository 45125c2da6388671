"""Invariants under every option: excluded rows, half precision, copies, and empty batches."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import fastvq

from ..cases import close, generator
from ..layers import assert_same_state, state

DIM, SIZE = 8, 12
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
SGD = functools.partial(torch.optim.SGD, lr=0.3)

LAYERS = {
    "heads": {"heads": 2, "codebook_dim": 3},
    "separate heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "use_cosine_sim": True},
    "layer norm": {"codebook_dim": 3, "layernorm_after_project_in": True},
    "losses": {"orthogonal_reg_weight": 1.0, "codebook_diversity_loss_weight": 1.0},
    "cross entropy": {"commitment_use_cross_entropy_loss": True, "orthogonal_reg_active_codes_only": True},
    "affine": {"affine_param": True},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9, "directional_reparam_variance": 0.0},
    "bridge": {"vq_bridge": nn.Linear(DIM, DIM)},
    "synchronous": {"sync_update_v": 0.5, **LEARNABLE},
    "in place": {"in_place_codebook_optimizer": SGD, **LEARNABLE},
    "gumbel": {"straight_through": True, "route_gradients_to_input": False},
}
STACKS = {
    "projected": {"codebook_dim": 3},
    "cosine, shared": {"use_cosine_sim": True, "shared_codebook": True},
    "gradient through levels": {"quant_grad_frac": 0.5, **LEARNABLE},
    "implicit": {"implicit_neural_codebook": True},
    "beam": {"beam_size": 3},
    "in place": {"in_place_codebook_optimizer": SGD, "shared_codebook": True, **LEARNABLE},
    "dropout": {"quantize_dropout": True},
    "diveq": {"diveq": True},
}


def build(kind):
    torch.manual_seed(0)
    stack, _, name = kind.partition(": ")
    if stack == "stack":
        return fastvq.ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=3, **copy.deepcopy(STACKS[name]))
    return fastvq.VectorQuantize(DIM, SIZE, **copy.deepcopy(LAYERS[name]))


KINDS = [*(f"layer: {name}" for name in LAYERS), *(f"stack: {name}" for name in STACKS)]


def batch(dtype=torch.float32):
    return torch.randn(3, 10, DIM, generator=generator()).to(dtype)


def step(module, x, **forward):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    quantized, indices, loss = module(x, **forward)
    (quantized.square().sum() + loss.sum()).backward()
    return quantized.detach(), indices, loss.detach(), x.grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_row_is_a_masked_row(kind):
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, 3] = mask[2, 9] = False
    dirty = batch().masked_fill(~mask[..., None], torch.nan)
    clean, poisoned = build(kind), build(kind)
    expected, found = step(clean, batch(), mask=mask), step(poisoned, dirty)
    if kind == "stack: diveq":  # noise on different rows
        expected, found = expected[1:3], found[1:3]
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert (found[1 if len(found) == 4 else 0][~mask] == -1).all()
    for (name, a), b in zip(poisoned.named_parameters(), clean.parameters(), strict=True):
        assert a.isfinite().all(), name
        if b.grad is not None and kind != "stack: diveq":
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
        assert a.grad is None or a.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_the_codebooks(kind):
    module = build(kind)
    codebooks = [m for m in module.modules() if isinstance(m, fastvq.codebook.Codebook)]
    before = [c.embed.detach().clone() for c in codebooks]
    module.bfloat16()
    for codebook, embed in zip(codebooks, before, strict=True):
        assert torch.equal(codebook.embed, embed)
    quantized, _, _, grad = step(module, batch(torch.bfloat16))
    assert (quantized.dtype, grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert quantized.isfinite().all()
    assert all(c.embed_avg.dtype == torch.float32 for c in codebooks)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_alike(kind):
    module = build(kind)
    step(module, batch())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin = copy.deepcopy(module)
        for a, b in zip(step(copied, batch()), step(twin, batch()), strict=True):
            assert torch.equal(a, b)
        assert_same_state(copied, state(twin))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind):
    module = build(kind)
    quantized, indices, loss = module(torch.zeros(0, 10, DIM))
    assert quantized.shape == (0, 10, DIM)
    assert indices.shape[:2] == (0, 10)
    assert loss.isfinite().all()
    assert all(t.isfinite().all() for t in state(module).values())


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_is_bitwise_frozen(kind):
    module = build(kind)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    step(module, batch(), freeze_codebook=True)
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), name
    for name, parameter in module.named_parameters():
        # An implicit codebook's networks are no codes; orthogonality is asked of frozen ones too.
        if "_codebook" in name and kind != "layer: losses":
            assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_eval_in_inference_mode_touches_nothing(kind):
    module = build(kind).eval()
    before = state(module)
    with torch.inference_mode():
        quantized, indices, _ = module(batch())
        close(module.get_output_from_indices(indices), quantized)
        assert torch.equal(module.encode(batch()), indices)
    assert_same_state(module, before)


@pytest.mark.parametrize(
    "kind", ["layer: bridge", "layer: affine", "layer: cross entropy", "stack: implicit", "stack: beam"]
)
def test_autocast_chooses_the_same_indices(kind):
    plain, cast = build(kind), build(kind)
    expected = step(plain, batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = step(cast, batch())
    for a, b in zip(found[:3], expected[:3], strict=True):  # a backward pass under autocast rounds
        close(a, b)
    assert_same_state(cast, state(plain))
