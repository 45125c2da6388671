"""Audio in files: reading, in one format, and writing."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fastvq.errors import DataError, first_line
from fastvq.extras import require
from fastvq.files import StrPath

from .audio_format import AudioFormat
from .reader import Reader

SUFFIXES = frozenset({".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"})
"""Endings of the files that are audio."""
WRITTEN = frozenset({".flac", ".mp3", ".ogg", ".wav"})
"""Endings of the audio that `write_audio` writes."""
_FULL_SCALE = 1 << 15
_KINDS = {".flac": ("FLAC", "PCM_16"), ".mp3": ("MP3", None), ".ogg": ("OGG", "VORBIS"), ".wav": ("WAV", "PCM_16")}
_BLOCK = 1 << 16


def read_audio(path: StrPath, format: AudioFormat, content: bytes | None = None) -> Tensor:
    """Return a file as clips of one length, one after the other, int16 (clips, channels, length).

    The last clip ends in zeros where the file ends within it.

    Args:
        path, content: see `read_signal`.
        format: sample rate, channels and length.

    Raises:
        DataError: see `read_signal`.
    """
    signal = read_signal(path, format.sample_rate, format.channels, content)
    return clips_of(signal, format.length)


def clips_of(signal: Tensor, length: int) -> Tensor:
    """Return a signal (channels, samples) as clips (clips, channels, length), the last padded by zeros."""
    padded = F.pad(signal, (0, -signal.shape[-1] % length))
    return padded.unflatten(1, (-1, length)).transpose(0, 1).contiguous()


def read_signal(path: StrPath, sample_rate: int, channels: int, content: bytes | None = None) -> Tensor:
    """Return a whole file as int16 (channels, samples): 32,768 times its samples in [-1, 1], rounded.

    Files of another rate are resampled. Stereo is mixed down to mono by its mean, and mono is doubled for stereo.
    Samples of float files beyond [-1, 1] are clipped.

    Args:
        path: the audio file.
        sample_rate: in Hz.
        channels: 1 or 2.
        content: the file's bytes where it stands in an archive; `path` then only names it.

    Raises:
        DataError: the file is not readable as audio, or empty, damaged, silent or of too many channels; the message
            names it.
        MissingExtraError: soundfile is not installed, or soxr for a file of another rate.
    """
    path = Path(path)
    samples, own_rate = _read(path, content)
    if not len(samples):
        raise DataError(f"{path} is not usable audio: it has no samples")
    if not np.isfinite(samples).all():
        raise DataError(f"{path} is not usable audio: it has samples that are NaN or infinite")
    samples = _mixed(path, samples, channels)
    if own_rate != sample_rate:
        samples = require("soxr", "audio").resample(samples, own_rate, sample_rate, quality="HQ")
    values = _sixteen_bit(samples.T)
    if not values.any():
        raise DataError(f"{path} is not usable audio: it is silent")
    return torch.from_numpy(np.ascontiguousarray(values))


def _read(path: Path, content: bytes | None) -> tuple[npt.NDArray[np.float32], int]:
    """Return all samples (samples, channels) of a file, and its sample rate."""
    soundfile = require("soundfile", "audio")
    if content is None and path.is_dir():
        raise DataError(f"{path} is not readable audio: it is a folder")
    if content is None and not path.exists():
        raise DataError(f"{path} doesn't exist")
    if not (path.stat().st_size if content is None else content):
        raise DataError(f"{path} is not readable audio: the file is empty")
    try:
        with soundfile.SoundFile(path if content is None else BytesIO(content)) as file:
            samples = file.read(dtype="float32", always_2d=True)
            rate, declared = int(file.samplerate), int(file.frames)
    except Exception as error:  # decoders raise errors of all kinds for damaged files
        raise DataError(f"{path} is not readable audio: {_why_unreadable(error)}") from error
    if len(samples) < declared < 1 << 62:  # a stream of unknown length declares a huge one
        raise DataError(f"{path} is damaged audio: it has {len(samples)} of {declared} samples")
    return samples, rate


def _sixteen_bit(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    return np.clip(np.rint(samples * np.float32(_FULL_SCALE)), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)


def _why_unreadable(error: Exception) -> str:
    text = first_line(error)
    return text.rpartition(": ")[2].rstrip(".").lower() if "Error opening" in text else text


def _mixed(path: Path, samples: npt.NDArray[np.float32], channels: int) -> npt.NDArray[np.float32]:
    own = samples.shape[1]
    if own == channels:
        return samples
    if channels == 1:
        return samples.mean(1, keepdims=True)
    if own == 1:
        return samples.repeat(channels, 1)
    raise DataError(f"{path} is not usable audio: it has {own} channels, which are not {channels} or 1")


def write_audio(path: StrPath | BinaryIO, audio: Tensor, sample_rate: int, ending: str) -> None:
    """Write audio (channels, samples), float in [-1, 1], in the format of an `ending`; wav and flac have 16 bits.

    Args:
        path: file to write, which need not have that ending, or a file that is open for writing.
        audio: the audio; samples beyond [-1, 1] are clipped.
        sample_rate: in Hz.
        ending: one of `WRITTEN`.
    """
    kind, subtype = _KINDS["." + ending.lower().lstrip(".")]
    samples: Any = audio.detach().float().cpu().clamp(-1, 1).T.contiguous().numpy()
    if subtype == "PCM_16":  # libsndfile would round down
        samples = _sixteen_bit(samples)
    target: Any = path if hasattr(path, "write") else str(path)
    with require("soundfile", "audio").SoundFile(
        target, "w", sample_rate, samples.shape[1], subtype=subtype, format=kind
    ) as file:
        for start in range(0, len(samples), _BLOCK):  # libsndfile's Vorbis encoder crashes on long blocks
            file.write(samples[start : start + _BLOCK])


SOUNDS = Reader(("clip", "clips"), SUFFIXES, read_audio, "int16", WRITTEN)
"""Files of audio, each cut into clips."""
