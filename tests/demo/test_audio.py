"""The demo of audio, and the rates that it compares."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.data import DATA_SETS, Examples
from fastvq.demo import audio, parts, rates
from fastvq.demo import folder as room
from fastvq.modalities import AudioConfig
from fastvq.runs import plots
from fastvq.training.config import PriorConfig

from ..modalities.test_audio_measures import voice

SMALL = AudioConfig(
    steps=1,
    batch_size=2,
    crop_length=2560,
    strides="32,40",
    width=4,
    dilations="1",
    codebook_size=4,
    dim=4,
    bottleneck_options={"num_quantizers": 3, "quantize_dropout": True},
)
SMALL_PRIOR = PriorConfig(pattern="delay", steps=1, batch_size=2, dim=8, depth=1, heads=2)


def few_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo see few of the shipped loops."""
    loops = DATA_SETS["music-loops"].load()
    few: Examples = dataclasses.replace(
        loops,
        train=loops.train[:4],
        test=loops.test[:3],
        test_names=loops.test_names[:3],
        train_labels=None,
        test_labels=None,
        class_names=None,
    )
    monkeypatch.setattr(audio, "load_examples", lambda _: few)
    monkeypatch.setattr("fastvq.runs.load.load_examples", lambda _: few)


def test_the_demo_writes_a_page_of_what_sounds_and_of_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_loops(monkeypatch)
    for name in ("picture_run", "picture_prior"):
        monkeypatch.setattr(parts, name, lambda *_, **__: None)
    monkeypatch.setattr(plots, "save_grid", lambda path, *_, **__: Image.new("L", (1, 1)).save(path))
    opus = {"codec": "Opus", "name": "Opus, 8 kbit/s", "kbit_s": 8.0, "log_mel_db": 3.0, "si_sdr_db": 9.0}
    monkeypatch.setattr(audio, "other_rates", lambda *_, **__: ([opus], ["Codec2 was not measured: it is not here"]))
    folder = tmp_path / "demo"
    metrics = audio.run_demo(folder, config=SMALL, prior_config=SMALL_PRIOR)
    assert metrics is not None
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (metrics["grid"], metrics["train_clips"], metrics["test_clips"]) == ([16, 3], 4, 3)
    ours = {rate["name"]: rate["kbit_s"] for rate in metrics["rates"][:3]}
    assert ours == {name: pytest.approx(0.025 * n) for n, name in ((1, "1 stage"), (2, "2 stages"), (3, "3 stages"))}
    assert metrics["equal_kbit_s"] == {"Opus": None, "Codec2": None}
    page = (folder / "index.html").read_text()
    for sound in ("stages-1-original", "stages-1-2-stages", "samples-1-sampled", "completions-1-completed"):
        assert f'src="media/{sound}.flac"' in page
        assert (folder / "media" / f"{sound}.flac").stat().st_size > 0
    assert "Codec2 was not measured: it is not here." in page
    assert (folder / "rates.png").exists()
    room._delete(folder)
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not left & {"index.html", "metrics.json", "clips.fvq", "stages.png", "rates.png", "stages-1-original.flac"}


def test_opus_is_aligned_and_better_at_higher_rates() -> None:
    soundfile = pytest.importorskip("soundfile")
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        pytest.skip("this libsndfile writes no Opus files")
    clips = torch.cat([voice(), 0.3 * voice()])
    found, missing = rates.other_rates(clips, sample_rate=16000)
    opus = [rate for rate in found if rate["codec"] == "Opus"]
    assert len(opus) == len(rates.OPUS_KBIT_S)
    assert opus[-1]["si_sdr_db"] > 10
    assert opus[-1]["log_mel_db"] < opus[0]["log_mel_db"]
    assert opus[0]["kbit_s"] < opus[-1]["kbit_s"]
    assert len(missing) == (0 if any(rate["codec"] == "Codec2" for rate in found) else 1)


def test_codec2_is_called_at_8_khz_and_its_delay_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = torch.cat([voice(), 0.3 * voice()])
    delay = 160

    def run(command: list[Any], **_: Any) -> None:
        program, mode, source, target = command
        assert mode in rates.CODEC2_MODES
        if program == "c2enc":
            assert Path(source).stat().st_size == 2 * 2 * 8000
            Path(target).write_bytes(bytes(100))
            run.source = Path(source).read_bytes()  # type: ignore[attr-defined]
        else:
            Path(target).write_bytes(np.zeros(delay, "<i2").tobytes() + run.source)  # type: ignore[attr-defined]

    monkeypatch.setattr(rates.shutil, "which", lambda program: program)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(rates, "_opus_rates", lambda *_: [])
    found, missing = rates.other_rates(clips, sample_rate=16000)
    assert not missing
    assert [rate["name"] for rate in found] == [f"Codec2, {mode}" for mode in rates.CODEC2_MODES]
    assert found[0]["kbit_s"] == 8 * 100 / 2 / 1000
    assert found[0]["log_mel_db"] < 1.5  # frequencies above 4 kHz are missing
    assert found[0]["si_sdr_db"] is None


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates.shutil, "which", lambda program: None)
    monkeypatch.setattr(rates, "_opus_rates", lambda *_: [])
    found, missing = rates.other_rates(voice(), sample_rate=16000)
    assert not found
    assert missing == ["Codec2 was not measured: the program c2enc is not here (Debian's package codec2 has it)"]


def test_the_rate_that_reaches_a_distance_lies_between_measured_ones() -> None:
    points = [{"codec": "Opus", "kbit_s": rate, "log_mel_db": db} for rate, db in ((8.0, 4.0), (16.0, 2.0))]
    assert rates.rate_that_reaches(points, "Opus", 3.0) == pytest.approx(12)
    assert rates.rate_that_reaches(points, "Opus", 5.0) is None
    assert rates.rate_that_reaches(points, "Opus", 1.0) is None
    assert rates.rate_that_reaches(points, "Codec2", 3.0) is None
    assert rates.rate_that_reaches(points, "Opus", 2.0) == pytest.approx(16)
