"""LlamaGen's quantizer against its formula, dense and in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import fastvq

from ..cases import close, generator


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_the_formula(weight):
    torch.manual_seed(0)
    vq = fastvq.LlamaGenVQ(5, 40, entropy_loss_weight=weight, entropy_temperature=0.1)
    with torch.no_grad():
        vq.embed.mul_(torch.rand(40, 1) + 0.5)
    x = torch.randn(3, 20, 5, dtype=torch.float64, generator=generator()).requires_grad_()
    weights = torch.randn(3, 20, 5, dtype=torch.float64, generator=generator(1))
    quantized, indices, loss = vq(x)
    (loss + (quantized * weights).sum()).backward()

    own, embed = x.detach().clone().requires_grad_(), vq.embed.detach().double().requires_grad_()
    rows, codes = normalize(own, dim=-1), normalize(embed, dim=-1)
    distances = torch.cdist(rows.flatten(0, 1), codes).square()
    assert torch.equal(indices.flatten(), distances.argmin(1))
    chosen = codes[indices]
    expected = (chosen - rows.detach()).square().mean() + 0.25 * (chosen.detach() - rows).square().mean()
    log_p = (-distances / 0.1).log_softmax(1)
    mean = log_p.exp().mean(0)
    entropy = -(log_p.exp() * log_p).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    expected = expected + weight * entropy
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    close(quantized.detach(), chosen.detach(), tolerance=tolerance)
    close(loss.double(), expected, tolerance=tolerance)
    (expected + (rows * weights).sum()).backward()
    close(x.grad, own.grad, tolerance=tolerance)
    close(vq.embed.grad.double(), embed.grad, tolerance=tolerance)


def test_images_decode_to_what_was_quantized():
    vq = fastvq.LlamaGenVQ(5, 40, channel_first=True).eval()
    quantized, indices, loss = vq(torch.randn(2, 5, 4, 3))
    assert torch.equal(vq.indices_to_codes(indices), quantized)
    close(quantized.detach().norm(dim=1), torch.ones(2, 4, 3))
    assert not loss
