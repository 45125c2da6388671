"""Separate autoencoders at several scales: what they share, what leading indices decode to, and how they learn."""

from __future__ import annotations

import re

import pytest
import torch

from fastvq import FSQ, ResidualVQ, VectorQuantize
from fastvq.models import (
    VQVAE,
    AudioDecoder,
    AudioEncoder,
    JukeboxBottleneck,
    JukeboxDecoder,
    JukeboxEncoder,
    NoBottleneck,
)

from ..cases import generator

STRIDES = [(2, 2, 4), (2, 2), (2,)]
GRIDS = [(2,), (8,), (16,)]
LENGTH = 32


def networks(strides):
    sizes = {"strides": strides, "width": 2, "kernel": 3}
    return AudioEncoder(1, 4, **sizes), AudioDecoder(4, 1, **sizes)


def make(quantizer=lambda: VectorQuantize(4, codebook_size=8, decay=0.5)):
    torch.manual_seed(0)
    encoders, decoders = zip(*map(networks, STRIDES), strict=True)
    bottleneck = JukeboxBottleneck(4, [quantizer() for _ in STRIDES], GRIDS)
    return VQVAE(JukeboxEncoder(encoders), bottleneck, JukeboxDecoder(decoders), value_range=(-1.0, 1.0))


def signals(count=3, length=LENGTH):
    return torch.rand(count, 1, length, generator=generator()) - 0.5


def alone(model, scale):
    """Return the autoencoder of one scale."""
    return VQVAE(model.encoder.encoders[scale], model.bottleneck.quantizers[scale], model.decoder.decoders[scale])


def test_the_scales_are_separate_autoencoders_in_one_sequence():
    model, x = make().eval(), signals()
    indices = model.encode(x)
    assert model.adapter.scales == ((2,), (8,), (16,))
    assert model.adapter.leading == (2, 10, 26)
    assert model.strides == (16,)
    own = [alone(model, scale).encode(x) for scale in range(3)]
    assert torch.equal(indices, torch.cat(own, 1))
    assert all(torch.equal(*pair) for pair in zip(model.adapter.stages(indices), own, strict=True))
    for scale, end in enumerate(model.adapter.leading):
        assert torch.equal(model.decode(indices[:, :end]), alone(model, scale).decode(own[scale]))
    every = model(x).reconstruction.unflatten(0, (3, 3))
    for scale, reconstruction in enumerate(every):
        torch.testing.assert_close(reconstruction, alone(model, scale)(x).reconstruction)
    assert torch.equal(model.reconstruct(x), model.restore(indices))


def test_each_learns_as_if_it_were_alone_also_from_parts_of_signals():
    """Gradients are a third, as the loss is a mean over scales, and codebooks are the same."""
    model, other, x = make().train(), make().train(), signals(length=16)
    output = model(x)
    assert output.indices.shape == (3, 1 + 4 + 8)
    (((output.reconstruction - torch.cat([x] * 3)).square().mean()) + output.loss).backward()
    for scale in range(3):
        single = alone(other, scale)
        result = single(x)
        ((result.reconstruction - x).square().mean() + result.loss).backward()
        pairs = zip(alone(model, scale).parameters(), single.parameters(), strict=True)
        for ours, theirs in pairs:
            if theirs.requires_grad:
                torch.testing.assert_close(3 * ours.grad, theirs.grad)
        ours, theirs = (one.bottleneck.quantizers[scale].codebook for one in (model, other))
        assert torch.equal(ours, theirs)


def test_a_scale_may_have_stages():
    model = make(lambda: ResidualVQ(dim=4, codebook_size=8, num_quantizers=2)).eval()
    indices = model.encode(signals())
    assert model.adapter.scales == ((2, 2), (8, 2), (16, 2))
    assert model.adapter.leading == (4, 20, 52)
    assert model.decode(indices[:, :20]).shape == (3, 1, LENGTH)
    assert len(model.adapter.stages(indices)) == 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make().decode(torch.zeros(1, 9, dtype=torch.int64)), ValueError, "indices: must have shape (B, 26)"),
        (lambda: make(lambda: NoBottleneck()), TypeError, "quantizers: must have indices, got a NoBottleneck"),
        (lambda: JukeboxBottleneck(4, [FSQ([8], dim=4)], [(2,)]), ValueError, "quantizers: must be at least 2"),
        (
            lambda: JukeboxEncoder([networks(strides)[0] for strides in reversed(STRIDES)]),
            ValueError,
            "encoders: must be at least 2, with strides that divide those before, got [2, 4, 16]",
        ),
        (lambda: JukeboxEncoder([networks((2,))[0]]), ValueError, "encoders: must be at least 2"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
