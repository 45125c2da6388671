"""IBQ against its formula with the softmax over all codes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

import fastvq

from ..cases import close, generator


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_losses_and_gradients_are_those_of_the_formula(weight):
    torch.manual_seed(0)
    ibq = fastvq.IBQ(5, 40, entropy_loss_weight=weight, entropy_temperature=0.5).double()
    x = torch.randn(3, 20, 5, dtype=torch.float64, generator=generator()).requires_grad_()
    weights = torch.randn(3, 20, 5, dtype=torch.float64, generator=generator(1))
    quantized, indices, loss = ibq(x)
    (loss + (quantized * weights).sum()).backward()

    own, codes = x.detach().clone().requires_grad_(), ibq.embed.detach().double().requires_grad_()
    logits = own.flatten(0, 1) @ codes.T
    p, hard = logits.softmax(1), one_hot(logits.argmax(1), 40).double()
    soft, chosen = ((hard + p - p.detach()) @ codes).view(x.shape), (hard @ codes).view(x.shape)
    assert torch.equal(indices.flatten(), logits.argmax(1))
    close(quantized.detach(), chosen.detach())
    expected = (soft - own).square().mean() + (chosen.detach() - own).square().mean()
    expected = expected + 0.25 * (chosen - own.detach()).square().mean()
    entropies = (logits / 0.5).log_softmax(1)
    mean = entropies.exp().mean(0)
    entropy = -(entropies.exp() * entropies).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    expected = expected + weight * entropy
    close(loss, expected)
    (expected + (soft * weights).sum()).backward()
    close(x.grad, own.grad)
    close(ibq.embed.grad.double(), codes.grad, tolerance={"rtol": 1e-5, "atol": 1e-6})
    assert (ibq.embed.grad != 0).any(1).all()


def test_images_decode_to_what_was_quantized():
    ibq = fastvq.IBQ(5, 40, channel_first=True).eval()
    images = torch.randn(2, 5, 4, 3)
    quantized, indices, loss = ibq(images)
    assert torch.equal(ibq.indices_to_codes(indices), quantized)
    assert indices.shape == (2, 4, 3)
    assert not loss
    before = ibq.embed.detach().clone()
    ibq.reinitialize_()
    assert not torch.equal(ibq.embed, before)


@pytest.mark.parametrize("make", [fastvq.IBQ, fastvq.LlamaGenVQ])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size: must be an integer"),
        ({"entropy_temperature": 0.0}, "entropy_temperature: must be positive"),
        ({"entropy_loss_weight": -1.0}, "entropy_loss_weight: must not be negative"),
    ],
)
def test_refuses_by_name(make, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**{"dim": 4, "codebook_size": 8} | options)
