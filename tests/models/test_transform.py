"""Audio as coefficients of blocks: the transform, companding, and networks that begin as both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastvq
from fastvq.models import VQVAE, StreamingDecoder, StreamingEncoder, TransformDecoder, TransformEncoder
from fastvq.models import transform as module
from fastvq.models.transform import Compand, Expand, lapped_cosines, overlap_of

SIZES: dict[str, Any] = {"strides": (4, 4), "width": 16, "dilations": (1, 2)}


def networks(channels: int = 1) -> tuple[TransformEncoder, TransformDecoder]:
    torch.manual_seed(0)
    return TransformEncoder(channels, 16 * channels, **SIZES), TransformDecoder(16 * channels, channels, **SIZES)


def test_the_transform_is_orthonormal_and_sorts_frequencies() -> None:
    rows = lapped_cosines(32)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(32))
    assert not rows[:, : 32 - overlap_of(32)].any()  # before what it shares with the block before
    time = torch.arange(64) + 0.5
    strength = [(rows @ (torch.pi / 32 * (k + 0.5) * time + 0.7).cos()).abs() for k in (5, 20)]
    assert [int(own.argmax()) for own in strength] == [5, 20]


def test_companding_narrows_levels_and_coefficients_and_is_undone() -> None:
    levels = torch.tensor([1e-3, 0.01, 0.1, 0.4])
    x = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)) * levels
    y = Compand()(x)
    assert float(((Expand()(y) - x).square().mean(1) / x.square().mean(1)).sqrt().max()) < 0.01
    level = x.square().mean(1).sqrt()
    torch.testing.assert_close(y.square().mean(1).sqrt(), (1 + 1000 * level).log() / torch.tensor(1001.0).log())
    ratio = (x[0, 0, 2] / x[0, 1, 2]).abs()
    torch.testing.assert_close((y[0, 0, 2] / y[0, 1, 2]).abs(), ratio**0.75, rtol=0.01, atol=0)
    assert not Expand()(Compand()(torch.zeros(1, 8, 3))).any()


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_silence_has_finite_gradients(noise: float) -> None:
    x = torch.zeros(1, 16, 3)
    x[0, 3, 1] = 0.5  # one coefficient among silent ones
    x.requires_grad_()
    (Expand()(Compand()(x) + noise * torch.randn(1, 16, 3))).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("channels", [1, 2])
def test_the_transforms_reproduce_all_but_the_last_overlap(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_NOISE", 1e-9)
    encoder, decoder = networks(channels)
    x = 0.1 * torch.randn(1, channels, 16 * 12)
    with torch.no_grad():
        padded = torch.nn.functional.pad(encoder.layers[0](x), (0, 1))
        y = decoder.layers[-1](padded)[..., decoder.delay : decoder.delay + x.shape[-1]]
        near = decoder(encoder(x))
    assert decoder.delay == 8
    torch.testing.assert_close(y[..., :-8], x[..., :-8], rtol=0, atol=1e-6)
    assert float((near - x)[..., :-8].square().mean() / x.square().mean()) < 0.05


def test_a_stream_is_late_by_the_overlap_and_whole_in_the_end() -> None:
    encoder, decoder = networks()
    quantizer = fastvq.ResidualVQ(dim=16, num_quantizers=2, codebook_size=8, kmeans_init=True)
    model = VQVAE(encoder, quantizer, decoder)
    model(torch.randn(4, 1, 16 * 20))
    model.eval()
    x = torch.randn(2, 1, 16 * 10)
    indices = StreamingEncoder(model)(x)
    assert torch.equal(indices, model.encode(x))
    stream = StreamingDecoder(model)
    with pytest.raises(RuntimeError, match="there is no stream"):
        stream.flush()
    expected = model.decode(indices)
    for _ in range(2):
        parts = [stream(part) for part in indices.split([1, 4, 5], 1)]
        assert [part.shape[-1] for part in parts] == [8, 64, 80]
        samples = torch.cat([*parts, stream.flush()], -1)
        torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)
