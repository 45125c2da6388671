"""Spectral losses and measures: their formulas, known signals, and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvq.models import spectral

RATE = 16000


def sine(frequency: float, samples: int = 8000, amplitude: float = 1.0) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency / RATE * torch.arange(samples))


def test_magnitudes_of_a_sine() -> None:
    found = spectral.magnitudes(sine(1000), 512, 128)
    assert found.shape == (257, 8000 // 128 + 1)
    assert float(found[32, 30]) == pytest.approx(1, rel=1e-3)  # 1000 Hz is bin 32
    assert float(found[100, 30]) < 0.0005
    batch = torch.stack([sine(1000), sine(500)]).view(2, 1, -1)
    torch.testing.assert_close(spectral.magnitudes(batch, 512, 128)[0, 0], found)


def test_mel_filters_cover_the_spectrum() -> None:
    filters = spectral.mel_filters(RATE, 1024, 40)
    assert filters.shape == (40, 513)
    assert float(filters.max()) <= 1
    # Neighbors cross at one half: between the first center and the last, they add up to 1.
    first, last = int(filters[0].argmax()), int(filters[-1].argmax())
    torch.testing.assert_close(filters.sum(0)[first + 1 : last], torch.ones(last - first - 1), rtol=0, atol=1e-5)
    centers = filters.argmax(1).double() * RATE / 1024
    mels = 2595 * (1 + centers / 700).log10()
    steps = mels.diff()
    assert float(steps[10:].std() / steps[10:].mean()) < 0.1
    assert (spectral.mel_filters(RATE, 64, 40).amax(1) > 0).all()  # narrower than the distance of two frequencies


def test_log_mel_is_in_decibels() -> None:
    tone = spectral.log_mel(sine(1000), RATE)
    assert tone.shape[0] == 80
    assert abs(float(tone[:, 10].max())) < 4
    softer = spectral.log_mel(sine(1000, amplitude=0.1), RATE)
    assert float(softer[:, 10].max()) == pytest.approx(float(tone[:, 10].max()) - 20, abs=0.01)
    assert (spectral.log_mel(torch.zeros(4000), RATE) == -80).all()


def test_log_mel_distance() -> None:
    noise = torch.randn(3, 1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert spectral.log_mel_distance(noise, noise, RATE).tolist() == [[0.0]] * 3
    torch.testing.assert_close(
        spectral.log_mel_distance(noise, noise / 2, RATE), torch.full((3, 1), 20 * math.log10(2))
    )


def test_stft_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    target, estimate = torch.randn(2, 2, 1, 2000, generator=generator)
    assert float(spectral.stft_loss(target, target)) == 0
    window, hop = 256, 64
    padded = [torch.nn.functional.pad(x[:, 0], (128, 128)) for x in (target, estimate)]
    taper = torch.hann_window(window) * (4 / window)
    wanted, own = (
        torch.stack([torch.fft.rfft(x[:, at : at + window] * taper) for at in range(0, 2001, hop)], -1).abs()
        for x in padded
    )
    expected = (wanted - own).norm() / wanted.norm() + (wanted.log() - own.log()).abs().mean()
    torch.testing.assert_close(spectral.stft_loss(estimate, target, [(window, hop)]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [spectral.stft_loss, lambda x, y: spectral.mel_loss(x, y, RATE)])
def test_losses_have_finite_gradients_and_fall_on_the_way_to_the_target(loss: Callable[..., Tensor]) -> None:
    target = torch.stack([sine(440), sine(440) * 0, sine(3000, amplitude=0.01)])[:, None]
    estimate = torch.zeros_like(target, requires_grad=True)
    value = loss(estimate, target)
    value.backward()
    assert math.isfinite(value.item())
    assert estimate.grad is not None
    assert estimate.grad.isfinite().all()
    values = [float(loss(share * target, target)) for share in (0.0, 0.5, 0.9, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0
    silent = torch.zeros(2, 1, 4000)
    assert math.isfinite(float(loss(silent + 0.1, silent)))


def test_si_sdr() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 1, 100_000, generator=generator)
    noise = torch.randn(5, 1, 100_000, generator=generator)
    found = spectral.si_sdr(target + 0.1 * noise, target)
    assert found.shape == (5, 1)
    torch.testing.assert_close(found, torch.full((5, 1), 20.0, dtype=torch.float64), rtol=0, atol=0.1)
    torch.testing.assert_close(spectral.si_sdr(3 * (target + 0.1 * noise), target), found, rtol=0, atol=1e-4)
    assert (spectral.si_sdr(target, target) > 75).all()
    assert spectral.si_sdr(torch.zeros(1, 100), torch.zeros(1, 100)).isfinite().all()
