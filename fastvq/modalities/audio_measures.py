"""Measures of reconstructed clips of audio beside their originals, each with the reason where it cannot be taken.

SI-SDR needs nothing; PESQ and STOI, which judge speech, need the packages `pesq` and `pystoi`, ViSQOL, which judges
music as well, `visqol-python`. Each has a sample rate of its own, to which clips are resampled; clips of lower rates
lack what PESQ and STOI judge. All three take the mean of stereo. The protocol is in docs/evaluation.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvq.errors import MeasureError, MissingExtraError
from fastvq.extras import require
from fastvq.models.spectral import si_sdr

from .base import Measures, PerExample

EXTRA = "audio-measures"
PESQ_WIDE_HZ, PESQ_NARROW_HZ, STOI_HZ, VISQOL_HZ = 16000, 8000, 10000, 48000
"""Sample rates of the measures: of ITU-T P.862.2 and P.862, of STOI's definition, of ViSQOL's mode for audio."""
_PESQ_LEAST_S = 0.25
_STOI_LEAST_S = 0.4
"""Least length of a clip: STOI compares parts of 30 frames, 384 ms."""
_VISQOL_LEAST_S = 1.0
"""Least length of a clip: ViSQOL compares parts of 45 frames, 960 ms."""


def audio_measures(sample_rate: int, length: int) -> Measures:
    """Return the measures for clips of a sample rate in Hz and a length in samples."""
    available: dict[str, PerExample] = {
        "si_sdr_db": lambda restored, x: si_sdr(restored.flatten(1), x.flatten(1)),
    }
    refused: dict[str, str] = {}
    makers: dict[str, Callable[[], PerExample]] = {
        "pesq_wide": lambda: _pesq(sample_rate, length, PESQ_WIDE_HZ, "wb"),
        "pesq_narrow": lambda: _pesq(sample_rate, length, PESQ_NARROW_HZ, "nb"),
        "stoi": lambda: _stoi(sample_rate, length),
        "visqol": lambda: _visqol(sample_rate, length),
    }
    for name, make in makers.items():
        try:
            available[name] = make()
        except (MeasureError, MissingExtraError) as error:
            refused[name] = str(error)
    return Measures(available, {}, refused)


def _pesq(sample_rate: int, length: int, rate: int, mode: str) -> PerExample:
    _check_rate(sample_rate, rate)
    _check_length(sample_rate, length, _PESQ_LEAST_S)
    library = require("pesq", EXTRA)

    def pesq(original: Any, restored: Any) -> float:
        try:
            return float(library.pesq(rate, original, restored, mode))
        except library.NoUtterancesError:
            return math.nan

    return partial(_of_each, pesq, sample_rate, rate)


def _stoi(sample_rate: int, length: int) -> PerExample:
    _check_rate(sample_rate, STOI_HZ)
    _check_length(sample_rate, length, _STOI_LEAST_S)
    library = require("pystoi", EXTRA)

    def stoi(original: Any, restored: Any) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return float(library.stoi(original, restored, STOI_HZ))
            except RuntimeWarning:  # too few frames are not silent
                return math.nan

    return partial(_of_each, stoi, sample_rate, STOI_HZ)


def _visqol(sample_rate: int, length: int) -> PerExample:
    _check_length(sample_rate, length, _VISQOL_LEAST_S)
    judge = require("visqol", EXTRA).VisqolApi()
    judge.create(mode="audio")

    def visqol(original: Any, restored: Any) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a silent reconstruction, whose score is NaN
            return float(judge.measure_from_arrays(original, restored, sample_rate=VISQOL_HZ).moslqo)

    return partial(_of_each, visqol, sample_rate, VISQOL_HZ)


def _check_length(sample_rate: int, length: int, least_s: float) -> None:
    """Raise a MeasureError if clips are shorter than a measure needs."""
    if length < least_s * sample_rate:
        raise MeasureError(f"clips of {length / sample_rate:.3g} s are shorter than the {least_s} s that it needs")


def _check_rate(sample_rate: int, rate: int) -> None:
    """Raise a MeasureError if clips lack the frequencies that a measure judges."""
    if sample_rate < rate:
        raise MeasureError(f"it needs {rate} Hz, the clips have {sample_rate} Hz")


def _of_each(measure: Callable[[Any, Any], float], sample_rate: int, rate: int, restored: Tensor, x: Tensor) -> Tensor:
    """Return the measure of each clip (B, C, T), (B,) float64, NaN where it finds no speech."""
    pairs = [[_resampled(clip, sample_rate, rate) for clip in clips.mean(1).cpu()] for clips in (x, restored)]
    values = [measure(*pair) if pair[0].any() else math.nan for pair in zip(*pairs, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def _resampled(clip: Tensor, sample_rate: int, rate: int) -> Any:
    """Return a clip (T,) of another sample rate, as an array."""
    samples = clip.numpy()
    if sample_rate == rate:
        return samples
    return require("soxr", "audio").resample(samples, sample_rate, rate, quality="HQ")
