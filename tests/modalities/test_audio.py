"""Audio among the modalities: its settings, the shipped loops, bit rates, and what is played."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvq
from fastvq.cli import main as cli
from fastvq.data import DATA_SETS
from fastvq.data.audio_format import AudioFormat
from fastvq.data.audio_io import read_signal, write_audio
from fastvq.data.music_loops import CLASSES, SHIPPED
from fastvq.errors import ConfigError
from fastvq.modalities import AudioConfig, modality_of
from fastvq.models import StreamingEncoder
from fastvq.training.build import build_model

from .folders import FOLDERS

SMALL: dict[str, Any] = {"data": "folder", **FOLDERS["audio"].settings}


def test_settings_fit_each_other_and_the_network() -> None:
    config = AudioConfig(**SMALL | {"channels": 2, "dilations": "1, 3", "activation": "snake"}, dim=4, codebook_size=8)
    assert config.example_format == AudioFormat(8000, 2, 128)
    assert (config.stride, config.feature_grid) == (32, (4,))
    model = build_model(config)
    assert model.encode(torch.rand(1, 2, 320)).shape == (1, 10, 8)
    assert model.value_range == (-1.0, 1.0)
    assert AudioConfig().bottleneck_options["quantize_dropout_per_item"]
    assert AudioConfig(bottleneck="vq").bottleneck_options == {}
    assert AudioConfig(bottleneck_options={"num_quantizers": 2}).bottleneck_options == {"num_quantizers": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_length": 100}, "clip_length must be a multiple of the product of the strides, 32, got 100"),
        ({"crop_length": 16}, "crop_length must be a multiple of the product of the strides, 32, got 16"),
        ({"crop_length": 256}, "crop_length must be at most clip_length = 128, got 256"),
        ({"strides": "4,x"}, "strides must be numbers from 1 to 1024, such as 2,4,5,8, got '4,x'"),
        ({"strides": ""}, "strides must be numbers"),
        ({"scale_strides": "2,x"}, "scale_strides must be numbers from 1 to 1024, such as 2,4,5,8, got '2,x'"),
        ({"scale_strides": "3"}, "clip_length must be a multiple of the product of the strides, 96, got 128"),
        (
            {"scale_strides": "2", "bottleneck": "none"},
            "scale_strides must be left out for the bottleneck none, which has no indices, got 2",
        ),
        ({"dilations": "0"}, "dilations must be numbers"),
        ({"activation": "relu"}, "activation must be one of elu, snake, got 'relu'"),
        ({"channels": 3}, "channels must"),
        ({"sample_rate": 0}, "sample_rate must be"),
        ({"mel_weight": -1.0}, "mel_weight must"),
        (
            {"data": "music-loops"},
            "sample_rate must be 16000, since music-loops is 1.28 s in mono at 16 kHz, got 8000",
        ),
        ({"data": "fashion-mnist"}, "data: fashion-mnist is for the modality image, not audio"),
    ],
)
def test_settings_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        AudioConfig(**SMALL | options)


def test_the_shipped_loops_are_small_and_free() -> None:
    assert SHIPPED.stat().st_size < 3_000_000
    loops = DATA_SETS["music-loops"].load()
    assert loops.class_names == tuple(CLASSES.values())
    assert loops.test_labels is not None
    assert len(loops.test_labels.unique()) == 10  # those with four files or more
    assert not {*loops.test_names} & {"loop_amen", "bd_808"}
    for part in (loops.train, loops.test):
        assert not (part % 4).any()  # 14 bits
        assert (part.float().abs().amax((1, 2)) > 0).all()
    notice = SHIPPED.with_name("music_loops.LICENSE").read_text()
    assert "CC0 1.0 Universal" in notice
    assert notice.count(".flac: ") == 130
    assert all(name in notice for name in loops.test_names)


def test_parts_of_clips_are_random_and_the_same_again() -> None:
    config, audio = AudioConfig(**SMALL), modality_of("audio")
    stored = torch.arange(4 * 128, dtype=torch.int16).view(4, 1, 128)
    parts = [audio.augmented(stored, None, config, step, torch.device("cpu")) for step in (0, 1, 0)]  # type: ignore[arg-type]
    assert parts[0].shape == (4, 1, 64)
    assert torch.equal(parts[0], parts[2])
    assert not torch.equal(parts[0], parts[1])
    steps = parts[0].diff(dim=2) * 32768
    assert torch.equal(steps, torch.ones_like(steps))


def test_a_spectrogram_has_low_frequencies_below() -> None:
    config, audio = AudioConfig(data="folder", sample_rate=16000), modality_of("audio")
    time = torch.arange(20480) / 16000
    low, high = (torch.sin(2 * torch.pi * frequency * time)[None] for frequency in (200, 6000))
    pictures = audio.as_images(torch.stack([low, high, low * 0]), config)
    assert pictures.shape == (3, 1, 80, 81)
    brightest = pictures[:, 0, :, 40].argmax(1).tolist()
    assert brightest[0] > 65
    assert brightest[1] < 10
    assert float(pictures[0].max()) > 0.95
    assert not pictures[2].any()


def test_what_is_played_follows_each_other(tmp_path: Path) -> None:
    config, audio = AudioConfig(**SMALL), modality_of("audio")
    signals = {"original": torch.full((2, 1, 128), 0.5), "decoded": torch.full((2, 1, 128), -0.5)}
    audio.play(tmp_path / "a.wav", signals, config, ".wav")
    row = read_signal(tmp_path / "a.wav", 8000, 1)[0]
    starts = [n * (128 + 2000) for n in range(4)]
    assert len(row) == 4 * (128 + 2000)
    assert [int(row[start + 64]) for start in starts] == [16384, -16384, 16384, -16384]
    assert not row[128:2128].any()


def test_a_run_codes_at_several_rates_and_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", str(tmp_path / "run")
    FOLDERS["audio"].write(data)
    (data / "broken.wav").write_bytes(b"no audio")
    write_audio(data / "silent.wav", torch.zeros(1, 200), 8000, "wav")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FOLDERS["audio"].settings.items()]
    train = ["train", f"--out={run}", f"--data={data}", *options, "--codebook-size=8", "--dim=4", "--steps=2"]
    train += ["--batch-size=4", "--quiet", "--num-quantizers=3"]
    assert cli.main([*train, "--no-skip-unreadable"]) != 0
    errors = capsys.readouterr().err
    assert "broken.wav is not readable audio" in errors
    assert "silent.wav is not usable audio: it is silent" in errors
    assert not (tmp_path / "run").exists()
    assert cli.main(train) == 0
    assert "skipped 2 files of 10" in capsys.readouterr().err
    page = (tmp_path / "run" / "index.html").read_text()
    assert page.count("<audio") == page.count('src="media/reconstructions-') == 4
    assert 'src="media/reconstructions-1-decoded.flac"' in page
    capsys.readouterr()
    write_audio(tmp_path / "long.wav", torch.rand(1, 500) - 0.5, 8000, "wav")
    sizes = {}
    for stages in (1, 3):
        coded = tmp_path / f"{stages}.fvq"
        command = ["encode", str(tmp_path / "long.wav"), str(coded), f"--run={run}", f"--stages={stages}"]
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        assert "4 clips of 256 bytes" in out
        sizes[stages] = coded.stat().st_size
        assert f"; 0.06 seconds at {8 * sizes[stages] / 0.064 / 1000:.2f} kbit/s" in out
        assert cli.main(["decode", str(coded), str(tmp_path / f"decoded{stages}"), f"--run={run}"]) == 0
        clips = sorted((tmp_path / f"decoded{stages}").glob("*.flac"))
        assert len(clips) == 4
        assert cli.main(["decode", str(coded), str(tmp_path / f"{stages}.flac"), f"--run={run}"]) == 0
        whole = read_signal(tmp_path / f"{stages}.flac", 8000, 1)
        assert torch.equal(whole, torch.cat([read_signal(clip, 8000, 1) for clip in clips], 1))
    assert sizes[1] < sizes[3]
    for number in (0, 4):
        command = ["encode", str(data / "s1.flac"), str(tmp_path / "x.fvq"), f"--run={run}", f"--stages={number}"]
        assert cli.main(command) != 0
        assert f"stages: must lie in [1, 3], got {number}" in capsys.readouterr().err
        assert not (tmp_path / "x.fvq").exists()
    model = fastvq.load(run)
    x = torch.rand(2, 1, 320) - 0.5
    encoder = StreamingEncoder(model.vqvae)
    assert torch.equal(torch.cat([encoder(chunk) for chunk in x.split(50, -1)], 1), model.encode(x))


def test_a_run_of_separate_scales_serves_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, coded = tmp_path / "data", tmp_path / "run", str(tmp_path / "a.fvq")
    FOLDERS["audio"].write(data)
    settings = FOLDERS["audio"].settings | {"strides": "4", "scale_strides": "2,4", "bottleneck": "vq"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    train = [*options, "--codebook-size=8", "--dim=4", "--batch-size=4", "--warmup-steps=1", "--steps=2"]
    assert cli.main(["train", f"--data={data}", *train, "--plan"]) == 0
    assert "indices 4 of 8 codes + 16 of 8 codes + 32 of 8 codes" in capsys.readouterr().out
    assert cli.main(["train", f"--out={run}", f"--data={data}", *train, "--quiet"]) == 0
    assert cli.main(["train", f"--out={run}", "--resume", "--steps=3", "--quiet"]) == 0
    sizes = ["--kind=hierarchical", "--steps=2", "--dim=8", "--heads=2", "--depth=1", "--batch-size=4"]
    assert cli.main(["prior", str(run), *sizes, "--quiet"]) == 0
    assert "warning" not in capsys.readouterr().err
    for picture in ("indices", "scales", "samples"):
        assert (run / f"{picture}.png").exists()
    assert 'src="media/scales-1-scale-2.flac"' in (run / "index.html").read_text()
    model = fastvq.load(run)
    x = torch.rand(2, 1, 128) - 0.5
    indices = model.encode(x)
    assert indices.shape == (2, 52)
    assert model.decode(indices[:, :20]).shape == model.decode(indices).shape == x.shape
    with pytest.raises(ValueError, match=r"indices: must be \(B, 52\), got \(2, 8\)"):
        model.decode(indices[:, :8])
    for command in (
        ["encode", str(data / "s1.flac"), coded, f"--run={run}", "--model=prior"],
        ["decode", coded, str(tmp_path / "a.flac"), f"--run={run}"],
        ["evaluate", str(run)],
        ["sample", str(run), f"--out={tmp_path / 's.wav'}", "--count=2", "--top-k=3"],
    ):
        assert cli.main(command) == 0, command
    assert len(read_signal(tmp_path / "s.wav", 8000, 1)[0]) >= 2 * 128
    capsys.readouterr()
    assert cli.main(["sample", str(run), f"--out={tmp_path / 'c.wav'}", "--begin", str(data / "s1.flac")]) == 2
    assert "the indices of this run are scales of whole clips, which have no beginning" in capsys.readouterr().err
