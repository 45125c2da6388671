"""Measures of audio: their values, and why they cannot be taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastvq.errors import MissingExtraError
from fastvq.modalities.audio_measures import audio_measures
from fastvq.models.spectral import si_sdr

RATE = 16000


def voice(seconds: float = 1.0, rate: int = RATE) -> Tensor:
    """Return a buzz that is loud and soft by turns, as syllables are, (1, 1, T)."""
    time = torch.arange(int(seconds * rate)) / rate
    buzz = sum(torch.sin(2 * torch.pi * 120 * k * time) / k for k in range(1, 20))
    return (0.2 * buzz * torch.sin(2 * torch.pi * 4 * time).square())[None, None]


def test_si_sdr_needs_no_package() -> None:
    x = voice()
    noisy = x + 0.01 * torch.randn_like(x)
    taken = audio_measures(RATE, RATE)
    assert torch.equal(taken.per_example["si_sdr_db"](noisy, x), si_sdr(noisy.flatten(1), x.flatten(1)))


@pytest.mark.parametrize(
    ("package", "names"), [("pesq", ("pesq_wide", "pesq_narrow")), ("pystoi", ("stoi",)), ("visqol", ("visqol",))]
)
def test_measures_fall_with_noise_and_have_no_value_for_silence(package: str, names: tuple[str, ...]) -> None:
    pytest.importorskip(package)
    x = torch.cat([voice(), voice(), torch.zeros(1, 1, RATE)])
    restored = x.clone()
    restored[1] += 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    taken = audio_measures(RATE, RATE).per_example
    for name in names:
        same, noisy, silent = taken[name](restored.expand(-1, 2, -1), x.expand(-1, 2, -1)).tolist()
        assert same > 0.99, name
        assert noisy < same, name
        assert math.isnan(silent), name


@pytest.mark.parametrize(
    ("rate", "length", "name", "reason"),
    [
        (8000, 8000, "pesq_wide", "it needs 16000 Hz, the clips have 8000 Hz"),
        (8000, 8000, "stoi", "it needs 10000 Hz, the clips have 8000 Hz"),
        (16000, 3200, "pesq_narrow", "clips of 0.2 s are shorter than the 0.25 s that it needs"),
        (16000, 15000, "visqol", "clips of 0.938 s are shorter than the 1.0 s that it needs"),
        (16000, 4800, "stoi", "clips of 0.3 s are shorter than the 0.4 s that it needs"),
    ],
)
def test_clips_that_a_measure_is_not_for_are_named(rate: int, length: int, name: str, reason: str) -> None:
    taken = audio_measures(rate, length)
    assert taken.refused[name] == reason
    assert name not in taken.per_example


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str, extra: str) -> None:
        raise MissingExtraError(f'{module} is missing: pip install "fastvq-torch[{extra}]"', name=module)

    monkeypatch.setattr("fastvq.modalities.audio_measures.require", absent)
    taken = audio_measures(RATE, RATE)
    assert list(taken.per_example) == ["si_sdr_db"]
    assert taken.refused["stoi"] == 'pystoi is missing: pip install "fastvq-torch[audio-measures]"'
    assert set(taken.refused) == {"pesq_wide", "pesq_narrow", "stoi", "visqol"}
