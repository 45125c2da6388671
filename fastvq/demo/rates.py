"""Quality of a codec of audio at each of its bit rates, beside Opus and Codec2.

All clips are coded as one file, one after the other, which saves headers, and cut apart again. Opus comes with
libsndfile; Codec2 is the pair of programs `c2enc` and `c2dec`, for speech at 8 kHz.
"""

from __future__ import annotations

import io
import itertools
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.errors import MissingExtraError, counted, first_line
from fastvq.extras import require
from fastvq.files import write_whole
from fastvq.models import VQVAE
from fastvq.models.spectral import log_mel_distance, si_sdr

Rates = list[dict[str, Any]]
"""Records of "codec", "name", "kbit_s", "log_mel_db" and "si_sdr_db", the last None where waveforms are not kept."""
OPUS_KBIT_S = (6, 8, 12, 16, 24, 32)
CODEC2_MODES = ("700C", "1300", "2400", "3200")
_OPUS_RANGE_KBIT_S = (6, 256)
"""Bit rates of libsndfile's compression levels 1 and 0 for a channel, between which they are linear."""
_CODEC2_HZ = 8000
_LONGEST_DELAY_S, _DELAY_STEP_S = 0.1, 0.005


def stage_rates(model: VQVAE, indices: Tensor, clips: Tensor, stages: Sequence[int], *, sample_rate: int) -> Rates:
    """Return the quality of clips that are decoded from their leading stages, log2 K bits for each index.

    Args:
        model: the VQ-VAE, with a residual quantizer.
        indices: (N, T, Q), those of the clips.
        clips: (N, C, samples), float.
        stages: numbers of leading stages.
        sample_rate: in Hz.
    """
    seconds = clips.shape[-1] / sample_rate
    bits = [math.log2(size) for size in model.adapter.stage_sizes()]
    rates: Rates = []
    for count in stages:
        with torch.no_grad():
            restored = model.restore(indices[..., :count])
        kbit_s = sum(bits[:count]) * indices.shape[1] / seconds / 1000
        rates.append(_record("fastvq", counted(count, "stage"), kbit_s, restored, clips, sample_rate))
    return rates


def other_rates(clips: Tensor, *, sample_rate: int) -> tuple[Rates, list[str]]:
    """Return the quality of mono clips (N, 1, samples) coded by Opus and Codec2, and why what is missing is missing."""
    rates: Rates = []
    missing: list[str] = []
    codecs: list[tuple[str, Callable[[Tensor, int], Rates]]] = [("Opus", _opus_rates), ("Codec2", _codec2_rates)]
    for name, measure in codecs:
        try:
            rates += measure(clips, sample_rate)
        except (MissingExtraError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            missing.append(f"{name} was not measured: {first_line(error)}")
    return rates, missing


def rate_that_reaches(rates: Rates, codec: str, log_mel_db: float) -> float | None:
    """Return the bit rate in kbit/s at which a codec reaches a log-mel distance, between its measured rates linearly.

    None if it reaches it at none of them, or at the lowest already.
    """
    points = sorted((rate["kbit_s"], rate["log_mel_db"]) for rate in rates if rate["codec"] == codec)
    for (low, above), (rate, distance) in itertools.pairwise(points):
        if above > log_mel_db >= distance:
            return float(low + (rate - low) * (above - log_mel_db) / (above - distance))
    return None


def _opus_rates(clips: Tensor, sample_rate: int) -> Rates:
    soundfile = require("soundfile", "audio")
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        raise RuntimeError(f"libsndfile {soundfile.__libsndfile_version__} writes no Opus files, 1.1 does")
    signal = clips[:, 0].flatten().numpy()
    lowest, highest = _OPUS_RANGE_KBIT_S
    rates: Rates = []
    for kbit_s in OPUS_KBIT_S:
        level = (highest - kbit_s) / (highest - lowest)
        file = io.BytesIO()
        soundfile.write(file, signal, sample_rate, format="OGG", subtype="OPUS", compression_level=level)
        size = len(file.getvalue())
        file.seek(0)
        samples, own_rate = soundfile.read(file, dtype="float32")
        restored = _clips_of(_resampled(samples, own_rate, sample_rate), clips)
        rates.append(
            _record("Opus", f"Opus, {kbit_s} kbit/s", _kbit_s(size, clips, sample_rate), restored, clips, sample_rate)
        )
    return rates


def _codec2_rates(clips: Tensor, sample_rate: int) -> Rates:
    for program in ("c2enc", "c2dec"):
        if shutil.which(program) is None:
            raise OSError(f"the program {program} is not here (Debian's package codec2 has it)")
    signal = _resampled(clips[:, 0].flatten().numpy(), sample_rate, _CODEC2_HZ)
    pcm = (signal * 32768).round().clip(-32768, 32767).astype("<i2").tobytes()
    rates: Rates = []
    with tempfile.TemporaryDirectory() as folder:
        source, coded, decoded = (Path(folder) / name for name in ("source.raw", "coded.bit", "decoded.raw"))
        write_whole(source, pcm)
        for mode in CODEC2_MODES:
            for program, given, made in (("c2enc", source, coded), ("c2dec", coded, decoded)):
                subprocess.run([program, mode, str(given), str(made)], check=True, capture_output=True, timeout=60)
            samples = np.frombuffer(decoded.read_bytes(), "<i2").astype(np.float32) / 32768
            aligned = _aligned(_resampled(samples, _CODEC2_HZ, sample_rate), clips, sample_rate)
            kbit_s = _kbit_s(coded.stat().st_size, clips, sample_rate)
            # Its phases are made up: a difference of waveforms says nothing.
            rates.append(
                _record("Codec2", f"Codec2, {mode}", kbit_s, aligned, clips, sample_rate) | {"si_sdr_db": None}
            )
    return rates


def _record(codec: str, name: str, kbit_s: float, restored: Tensor, clips: Tensor, sample_rate: int) -> dict[str, Any]:
    return {
        "codec": codec,
        "name": name,
        "kbit_s": kbit_s,
        "log_mel_db": float(log_mel_distance(restored, clips, sample_rate).mean()),
        "si_sdr_db": float(si_sdr(restored.flatten(1), clips.flatten(1)).mean()),
    }


def _kbit_s(size: int, clips: Tensor, sample_rate: int) -> float:
    return 8 * size / (len(clips) * clips.shape[-1] / sample_rate) / 1000


def _clips_of(signal: Any, clips: Tensor) -> Tensor:
    """Return a signal (samples,) cut into clips like others, zeros behind its end."""
    samples = torch.from_numpy(np.ascontiguousarray(signal))[: clips.numel()]
    return F.pad(samples, (0, clips.numel() - len(samples))).view_as(clips)


def _aligned(signal: Any, clips: Tensor, sample_rate: int) -> Tensor:
    """Return a signal as clips, without the delay at which it is nearest to them."""
    shifts = range(0, round(_LONGEST_DELAY_S * sample_rate), round(_DELAY_STEP_S * sample_rate))
    candidates = [_clips_of(signal[shift:], clips) for shift in shifts]
    return min(candidates, key=lambda restored: float(log_mel_distance(restored, clips, sample_rate).mean()))


def _resampled(samples: Any, rate: int, wanted: int) -> Any:
    return samples if rate == wanted else require("soxr", "audio").resample(samples, rate, wanted, quality="HQ")
