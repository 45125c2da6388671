"""SQ-VAE's quantizer against its formula, dense."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def test_losses_and_gradients_are_those_of_the_formula():
    """With the noise that the layer has drawn: the same seed gives the same one."""
    torch.manual_seed(0)
    vq = fastvq.StochasticVQ(5, 20, variance=2.0, temperature=0.7, loss_weight=0.5)
    x, weights = (torch.randn(3, 8, 5, generator=generator(seed)) for seed in (1, 2))
    x.requires_grad_()
    torch.manual_seed(4)
    quantized, indices, loss = vq(x)
    (loss + (quantized * weights).sum()).backward()

    torch.manual_seed(4)
    seed = int(torch.randint(2**62, (), device="cpu"))
    uniform = torch.rand(24, 20, generator=torch.Generator().manual_seed(seed)).double()
    noise = -(-uniform.log()).log()
    own, embed, log_variance = (
        t.detach().double().requires_grad_() for t in (x.flatten(0, 1), vq.embed, vq.log_variance)
    )
    square = torch.cdist(own, embed).square() / (2 * log_variance.exp())
    log_p = (-square).log_softmax(1)
    y = ((log_p + noise) / 0.7).softmax(1)
    expected = y @ embed
    entropy = -(log_p.exp() * log_p).sum(1)
    total = 0.5 * ((own - expected).square().sum(1) / (2 * log_variance.exp()) - entropy).mean()
    (total + (expected * weights.flatten(0, 1)).sum()).backward()
    close(quantized.flatten(0, 1).double(), expected, tolerance=TOLERANCE)
    assert torch.equal(indices.flatten(), y.argmax(1))
    close(loss.double(), total, tolerance=TOLERANCE)
    close(x.grad.flatten(0, 1).double(), own.grad, tolerance=TOLERANCE)
    close(vq.embed.grad.double(), embed.grad, tolerance=TOLERANCE)
    close(vq.log_variance.grad.double(), log_variance.grad, tolerance=TOLERANCE)


def test_a_loss_on_the_samples_makes_the_variance_fall():
    torch.manual_seed(0)
    vq = fastvq.StochasticVQ(2, 8)
    with torch.no_grad():
        vq.embed.mul_(3)
    x = vq.embed.detach()[torch.randint(8, (200,))][None]
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        quantized, _, loss = vq(x)
        (100 * (quantized - x).square().mean() + loss).backward()
        optimizer.step()
    assert vq.log_variance < -0.5


def test_eval_has_the_nearest_codes():
    torch.manual_seed(0)
    vq = fastvq.StochasticVQ(5, 20, channel_first=True).eval()
    x = torch.randn(2, 5, 4, 3)
    quantized, indices, loss = vq(x)
    distances = torch.cdist(x.movedim(1, -1).double().flatten(0, 2), vq.embed.double())
    assert torch.equal(indices.flatten(), distances.argmin(1))
    assert torch.equal(vq.indices_to_codes(indices), quantized)
    assert not loss
    vq.anneal_(1.0)
    vq.reinitialize_()
    assert vq.log_variance == 0


@pytest.mark.parametrize("name", ["variance", "temperature", "final_temperature"])
def test_what_cannot_be_is_named(name):
    with pytest.raises(ValueError, match=f"{name}: must be positive and finite, got 0"):
        fastvq.StochasticVQ(5, 20, **{name: 0})
