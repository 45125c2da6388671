"""Spectral losses and measures of audio, in plain torch operations.

Waveforms are (..., T), float in [-1, 1]. A short-time Fourier transform has frames of `window` samples under a Hann
window, one every `hop` samples, centered; half a window of zeros stands before and after the signal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-4
"""Least magnitude of which a logarithm is taken, -80 dB: what is softer counts as silence."""
_BELOW = FLOOR / 100
"""Least magnitude before those of a band are added up, so that the sum stays below `FLOOR`."""
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))
"""Windows and hops in samples."""
MEL_WINDOWS = ((128, 8), (256, 16), (512, 32), (1024, 64))
"""Windows in samples, and numbers of mel bands; the hop is a quarter of the window."""


def magnitudes(x: Tensor, window: int, hop: int, *, floor: float = FLOOR) -> Tensor:
    """Return the magnitudes (..., window / 2 + 1, frames) of a short-time Fourier transform, at least `floor`.

    They are divided by window / 4, so that a sine of amplitude 1 has magnitude 1.
    """
    rows = F.pad(x.reshape(-1, x.shape[-1]).float(), (window // 2, window // 2))
    taper = torch.hann_window(window, device=x.device) * (4 / window)
    spectrum = torch.stft(rows, window, hop, window=taper, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    # The root of the floor, as the gradient of a root is infinite at zero.
    return power.clamp_min(floor**2).sqrt().reshape(*x.shape[:-1], *power.shape[1:])


def mel_filters(sample_rate: int, window: int, bands: int, device: torch.device | str = "cpu") -> Tensor:
    """Return triangular filters (bands, window / 2 + 1) whose centers are equidistant on the mel scale.

        mel(f) = 2595 log10(1 + f / 700)

    A filter rises from the center of the one below to 1 at its own and falls to that of the one above. The lowest
    starts at 0 Hz and the highest ends at half the sample rate. A filter that is narrower than the distance of two
    frequencies has the one that is nearest to its center.

    Source: O'Shaughnessy, Speech Communication, 1987, for the scale; Davis and Mermelstein 1980 for the filters.
    """
    return _mel_filters(sample_rate, window, bands, torch.device(device))


# Kept on the device: a copy in each step would let training wait for it.
@functools.lru_cache(maxsize=32)
def _mel_filters(sample_rate: int, window: int, bands: int, device: torch.device) -> Tensor:
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, top, bands + 2, dtype=torch.float64, device="cpu")
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64, device="cpu")
    low, center, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((frequencies - low) / (center - low), (high - frequencies) / (high - center)).clamp_min(0)
    empty = filters.amax(1) == 0
    nearest = (frequencies - center).abs().argmin(1)
    filters[empty, nearest[empty]] = 1
    return filters.float().to(device, non_blocking=True)


def log_mel(x: Tensor, sample_rate: int, *, window: int = 1024, hop: int = 256, bands: int = 80) -> Tensor:
    """Return the log-mel spectrum (..., bands, frames) in dB: `20 log10 max(FLOOR, sum_f filter_f |X_f|)`.

    A sine of amplitude 1 in the middle of a band has about 0 dB, and digital silence -80 dB.
    """
    filters = mel_filters(sample_rate, window, bands, x.device)
    return 20 * (filters @ magnitudes(x, window, hop, floor=_BELOW)).clamp_min(FLOOR).log10()


def log_mel_distance(x: Tensor, y: Tensor, sample_rate: int) -> Tensor:
    """Return the mean absolute difference (...) of two log-mel spectra in dB, with 80 bands of windows of 1,024."""
    return (log_mel(x, sample_rate) - log_mel(y, sample_rate)).abs().mean((-2, -1))


def stft_loss(estimate: Tensor, target: Tensor, resolutions: Sequence[tuple[int, int]] = RESOLUTIONS) -> Tensor:
    """Return the multi-resolution STFT loss () of waveforms (..., T).

        mean over resolutions of  ||S - S'||_F / ||S||_F + mean |ln S - ln S'|

    with the magnitudes S of the target and S' of the estimate; the norms are over all waveforms together.

    Source: Yamamoto, Song, Kim, Parallel WaveGAN, 2020, equations 3 to 6.
    """
    total = estimate.new_zeros(())
    for window, hop in resolutions:
        own, wanted = magnitudes(estimate, window, hop), magnitudes(target, window, hop)
        total = total + (wanted - own).norm() / wanted.norm() + (wanted.log() - own.log()).abs().mean()
    return total / len(resolutions)


def mel_loss(
    estimate: Tensor, target: Tensor, sample_rate: int, windows: Sequence[tuple[int, int]] = MEL_WINDOWS
) -> Tensor:
    """Return the mean absolute difference () of log-mel spectra, natural logarithm, over windows of several lengths.

    Source: Kumar et al., High-Fidelity Audio Compression with Improved RVQGAN (DAC), 2023, section 3.4.
    """
    total = estimate.new_zeros(())
    for window, bands in windows:
        filters = mel_filters(sample_rate, window, bands, target.device)
        own, wanted = (filters @ magnitudes(x, window, window // 4, floor=_BELOW) for x in (estimate, target))
        total = total + (own.clamp_min(FLOOR).log() - wanted.clamp_min(FLOOR).log()).abs().mean()
    return total / len(windows)


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio (...) in dB of waveforms (..., T).

        10 log10(|a s|^2 / |a s - s'|^2),   a = <s', s> / |s|^2

    with target s and estimate s', in float64; `FLOOR^2` times the number of samples is added to both, so that silence
    has a value.

    Source: Le Roux et al., SDR - Half-baked or Well Done?, 2019, equation 5.
    """
    estimate, target = estimate.double(), target.double()
    least = FLOOR**2 * target.shape[-1]
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp_min(least)
    wanted = scale * target
    return 10 * ((wanted.square().sum(-1) + least) / ((wanted - estimate).square().sum(-1) + least)).log10()
