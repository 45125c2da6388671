"""Options of vector_quantize_pytorch's layers before and after `accelerate`."""

from __future__ import annotations

import pytest
import torch

import fastvq

from .test_parity import assert_alike, tensors

vqp = pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")

MASK = torch.arange(20) < torch.tensor([[12], [20]])
OPTIONS = {
    "plain": ({}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "heads": ({"heads": 2, "codebook_dim": 4}, {}),
    "separate heads": ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, {}),
    "projection": ({"codebook_dim": 4}, {}),
    "learnable": ({"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 0}, {}),
    "in-place": (
        {
            "learnable_codebook": True,
            "ema_update": False,
            "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        },
        {},
    ),
    "k-means": ({"kmeans_init": True, "kmeans_iters": 2}, {}),
    "dead codes": ({"threshold_ema_dead_code": 2}, {"mask": MASK}),
    "mask": ({}, {"mask": MASK}),
    "weight": ({}, {"ema_update_weight": torch.linspace(0, 1, 32)}),
    "frozen": ({}, {"freeze_codebook": True}),
    "diversity": ({"codebook_diversity_loss_weight": 0.1}, {}),
    "cross entropy": ({"commitment_use_cross_entropy_loss": True}, {"mask": MASK}),
    "Gumbel": ({"stochastic_sample_codes": True, "straight_through": True, "rotation_trick": False}, {}),
    "top k": ({}, {"topk": 3}),
    "orthogonal": ({"orthogonal_reg_weight": 0.1, "ema_update": False}, {}),
    "manual": ({"manual_ema_update": True}, {"accum_ema_update": True}),
    "breakdown": ({}, {"return_loss_breakdown": True}),
}


@pytest.mark.parametrize(("settings", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(settings, options):
    histories = []
    for accelerates in (False, True):
        torch.manual_seed(0)
        layer = vqp.VectorQuantize(8, 32, **settings)
        if accelerates:
            assert len(fastvq.accelerate(layer).replaced) == 2
        history = []
        for step in range(5):
            torch.manual_seed(step)
            x = torch.randn(2, 20, 8, requires_grad=True)
            result = layer(x, **options)
            if any(t.requires_grad for t in tensors(result)):
                sum(t.square().mean() for t in tensors(result) if t.requires_grad).backward()
            history.append([*tensors(result), x.grad, *(p.grad for p in layer.parameters())])
        layer.eval()
        history.append(tensors(layer(x, **options)))
        histories.append([history, list(layer.state_dict().values())])
    theirs, ours = histories
    for mine, their in zip(ours[0] + ours[1:], theirs[0] + theirs[1:], strict=True):
        assert_alike(mine, their, rtol=1e-3, atol=1e-4)


def test_given_indices_read_the_distances():
    torch.manual_seed(0)
    layer = vqp.VectorQuantize(8, 32).eval()
    x, indices = torch.randn(2, 20, 8), torch.randint(32, (2, 20))
    expected = layer(x, indices=indices)
    fastvq.accelerate(layer)
    assert_alike(layer(x, indices=indices), expected)
    assert layer._codebook(x)[2].shape == (1, 2, 20, 32)  # whoever calls the codebook gets all it returns


@pytest.mark.parametrize("options", [{"affine_param": True}, {"vq_bridge": torch.nn.Identity()}], ids=str)
def test_what_is_not_replaced_says_why(options):
    with pytest.raises(fastvq.errors.UnknownQuantizerError, match=next(iter(options))):
        fastvq.accelerate(vqp.VectorQuantize(8, 32, **options))
