"""Layers with many options trace as one graph in training, and a compiled step equals the eager one."""

from __future__ import annotations

import copy

import pytest
import torch

import fastvq

from ..cases import close, generator

DIM, SIZE = 8, 12
MASK = torch.rand(3, 10, generator=generator(7)) < 0.6

LAYERS = {
    "heads, losses, masked": (
        {
            "heads": 2,
            "codebook_dim": 3,
            "separate_codebook_per_head": True,
            "orthogonal_reg_weight": 1.0,
            "orthogonal_reg_active_codes_only": True,
            "codebook_diversity_loss_weight": 1.0,
            "commitment_use_cross_entropy_loss": True,
        },
        {"return_loss_breakdown": True, "mask": MASK},
    ),
    "affine, replacement": ({"affine_param": True, "threshold_ema_dead_code": 1e-9}, {}),
    "top-k": ({"commitment_weight": 0.5, "return_zeros_for_masked_padding": False}, {"topk": 3, "mask": MASK}),
}
STACKS = {
    "beam, implicit": {"beam_size": 2, "implicit_neural_codebook": True},
    "dropout, beam, cosine": {"quantize_dropout": True, "beam_size": 3, "use_cosine_sim": True},
}


def step(module, x, **forward):
    x = x.clone().requires_grad_()
    results = module(x, **forward)
    flat = [t for r in results for t in (r if isinstance(r, tuple) else (r,))]
    sum(t.square().sum() for t in flat if t.requires_grad).backward()
    return [t.detach() for t in flat], x.grad


def assert_compiles(module, gradients=None, **forward):
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(3, 10, DIM, generator=generator(seed))
        torch.manual_seed(seed)
        results, grad = step(module, x, **forward)
        torch.manual_seed(seed)
        others, other_grad = step(compiled, x, **forward)
        for a, b in zip(results, others, strict=True):
            close(a, b)
        close(grad, other_grad, tolerance=gradients)
        for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_vector_quantize(kind):
    torch.manual_seed(0)
    options, forward = LAYERS[kind]
    # A compiled layer scales the vectors by the temperature of the diversity loss, 100, before the op does: the logits
    # are hundreds, and their rounding in float32 is up to 1e-4 of a probability.
    gradients = {"rtol": 1e-3, "atol": 3e-5} if "codebook_diversity_loss_weight" in options else None
    assert_compiles(fastvq.VectorQuantize(DIM, SIZE, **options), gradients, **forward)


@pytest.mark.parametrize("kind", STACKS)
def test_residual_vq(kind):
    torch.manual_seed(0)
    assert_compiles(fastvq.ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=3, **STACKS[kind]))


def test_grouped_residual_vq_with_dropout():
    torch.manual_seed(0)
    module = fastvq.GroupedResidualVQ(dim=DIM, groups=2, codebook_size=SIZE, num_quantizers=3, quantize_dropout=True)
    assert_compiles(module)
