"""Audio files: the samples of each kind, and files that cannot be used."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvq.data.audio_format import AudioFormat
from fastvq.data.audio_io import SUFFIXES, WRITTEN, clips_of, read_audio, read_signal, write_audio
from fastvq.errors import ConfigError, DataError

soundfile = pytest.importorskip("soundfile")
RATE = 8000


def tone(samples: int = 4000, channels: int = 1) -> np.ndarray:
    time = np.arange(samples) / RATE
    return np.stack([0.4 * np.sin(2 * np.pi * (440 + 220 * n) * time) for n in range(channels)], 1)


def written(path: Path, samples: np.ndarray, subtype: str | None = None, rate: int = RATE) -> Path:
    if subtype is None:  # libsndfile would round down
        samples = as_stored(samples).T.numpy()
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def as_stored(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(np.clip(np.rint(samples.T * 32768), -32768, 32767).astype(np.int16))


def read(path: Path, channels: int = 1, rate: int = RATE) -> Tensor:
    return read_signal(path, rate, channels)


@pytest.mark.parametrize(
    ("subtype", "error"),
    [("PCM_16", 1), ("PCM_24", 1), ("PCM_32", 1), ("FLOAT", 1), ("DOUBLE", 1), ("PCM_U8", 256), ("ULAW", 1024)],
)
def test_every_depth_of_wav_has_its_samples(tmp_path: Path, subtype: str, error: int) -> None:
    found = read(written(tmp_path / "a.wav", tone(), subtype))
    assert found.dtype == torch.int16
    assert found.shape == (1, 4000)
    assert int((found.int() - as_stored(tone()).int()).abs().max()) <= error


@pytest.mark.parametrize("ending", sorted(WRITTEN))
def test_what_is_written_is_read_again(tmp_path: Path, ending: str) -> None:
    audio = torch.from_numpy(tone(channels=2).T).float()
    buffer = io.BytesIO()
    for target in (tmp_path / "a", buffer):
        write_audio(target, audio, RATE, ending)
    contents = [(tmp_path / "a").read_bytes(), buffer.getvalue()]
    for content in contents:
        found = read_signal(f"x{ending}", RATE, 2, content).float() / 32768
        assert found.shape[0] == 2
        if ending in (".wav", ".flac"):
            torch.testing.assert_close(found, audio, rtol=0, atol=1 / 32768)
        elif ending == ".ogg":
            assert float((found - audio).square().mean().sqrt()) < 0.02
    assert WRITTEN < SUFFIXES


def test_samples_beyond_full_scale_are_clipped(tmp_path: Path) -> None:
    loud = read(written(tmp_path / "a.wav", 4 * tone(), "FLOAT"))
    assert (int(loud.min()), int(loud.max())) == (-32768, 32767)
    write_audio(tmp_path / "b.wav", torch.tensor([[-3.0, 0.5, 3.0]]), RATE, ".wav")
    assert read(tmp_path / "b.wav").tolist() == [[-32768, 16384, 32767]]


def test_stereo_becomes_mono_by_its_mean_and_mono_becomes_stereo(tmp_path: Path) -> None:
    stereo = written(tmp_path / "a.wav", tone(channels=2))
    assert read(stereo, 2).shape == (2, 4000)
    mixed = read(stereo)
    assert int((mixed.int() - as_stored(tone(channels=2).mean(1, keepdims=True)).int()).abs().max()) <= 1
    doubled = read(written(tmp_path / "b.wav", tone()), 2)
    assert torch.equal(doubled[0], doubled[1])
    assert torch.equal(doubled[:1], as_stored(tone()))
    surround = written(tmp_path / "c.wav", tone(channels=6))
    assert read(surround).shape == (1, 4000)
    with pytest.raises(DataError, match=r"c\.wav is not usable audio: it has 6 channels, which are not 2 or 1"):
        read(surround, 2)


def test_other_rates_are_resampled(tmp_path: Path) -> None:
    pytest.importorskip("soxr")
    path = written(tmp_path / "a.wav", tone(channels=2))
    found = read(path, 2, 2 * RATE)
    assert found.shape == (2, 8000)
    inside = slice(400, 7600)  # a filter has borders
    error = found[:, ::2][:, 200:3800].int() - as_stored(tone(channels=2))[:, 200:3800].int()
    assert int(error.abs().max()) < 64
    assert found[:, inside].abs().max() < 0.42 * 32768


@pytest.mark.parametrize(("length", "clips"), [(1000, 4), (1500, 3), (4000, 1), (9000, 1)])
def test_a_file_is_cut_into_clips(tmp_path: Path, length: int, clips: int) -> None:
    path = written(tmp_path / "a.wav", tone(channels=2))
    found = read_audio(path, AudioFormat(RATE, 2, length))
    assert found.shape == (clips, 2, length)
    whole = found.transpose(0, 1).flatten(1)
    assert torch.equal(whole[:, :4000], read(path, 2))
    assert not whole[:, 4000:].any()
    assert torch.equal(clips_of(read(path, 2), length), found)
    assert torch.equal(read_audio("x.wav", AudioFormat(RATE, 2, length), path.read_bytes()), found)


def damaged_wav() -> bytes:
    """Return a wav file whose header promises more samples than there are."""
    data = as_stored(tone())[0].numpy().tobytes()
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 0, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", 0
    )
    return header[:40] + struct.pack("<I", len(data)) + data[:1000]


def flac(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="FLAC")
    return buffer.getvalue()


def wav(samples: np.ndarray, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype=subtype)
    return buffer.getvalue()


def with_value(value: float) -> np.ndarray:
    samples = tone()
    samples[17] = value
    return samples


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.wav", b"", "is not readable audio: the file is empty"),
        ("a.wav", b"no audio at all, but some text", "is not readable audio: format not recogni"),
        ("a.wav", wav(np.zeros((0, 1))), "is not usable audio: it has no samples"),
        ("a.wav", wav(with_value(np.nan)), "is not usable audio: it has samples that are NaN or infinite"),
        ("a.wav", wav(with_value(np.inf)), "is not usable audio: it has samples that are NaN or infinite"),
        ("a.wav", wav(0 * tone()), "is not usable audio: it is silent"),
        ("a.wav", wav(1e-6 * tone()), "is not usable audio: it is silent"),
        ("a.flac", flac(tone())[:900], "a.flac is "),
        ("a.flac", flac(tone())[:20], "is not readable audio"),
        ("a.wav", wav(tone())[:30], "is not readable audio|has no samples"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match=message):
        read_signal(name, RATE, 1, content)


def test_a_wav_that_was_cut_off_has_the_samples_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(damaged_wav())
    assert torch.equal(read(tmp_path / "a.wav"), as_stored(tone())[:, :500])


@pytest.mark.parametrize(("make", "message"), [(Path.mkdir, "it is a folder"), (lambda path: None, "doesn't exist")])
def test_what_is_no_file_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "x.wav")
    with pytest.raises(DataError, match=rf"x\.wav.*{message}"):
        read(tmp_path / "x.wav")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 10), "sample_rate must be at least 1, got 0"),
        ((8000, 3, 10), "channels must be 1 or 2, got 3"),
        ((8000, 1, 0), "length must be at least 1, got 0"),
    ],
)
def test_formats_are_checked(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AudioFormat(*arguments)
    assert AudioFormat(8000, 2, 10).shape == (2, 10)
