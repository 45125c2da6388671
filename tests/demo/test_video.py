"""The demo of video."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from fastvq.cli.main import main
from fastvq.demo import folder as room
from fastvq.demo import parts, video
from fastvq.errors import CheckpointError, ConfigError
from fastvq.modalities import VideoConfig
from fastvq.runs import plots
from fastvq.training.config import PriorConfig

from .clips import few_clips

SMALL = VideoConfig(
    steps=2,
    batch_size=4,
    width=8,
    residual_width=4,
    encoder_blocks=1,
    decoder_blocks=1,
    codebook_size=8,
    dim=4,
    downsamples=4,
)
SMALL_PRIOR = PriorConfig(steps=2, batch_size=4, dim=8, depth=1, heads=2)


def test_the_demo_writes_a_page_of_what_moves_and_of_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_clips(monkeypatch)
    for name in ("picture_run", "picture_prior"):
        monkeypatch.setattr(parts, name, lambda *_, **__: None)
    for name in ("save_grid", "save_reconstructions"):
        monkeypatch.setattr(plots, name, lambda path, *_, **__: Image.new("L", (1, 1)).save(path))
    lossless = {"name": "animated WebP, lossless", "bytes": 7, "psnr_db": None}
    monkeypatch.setattr(video, "animation_sizes", lambda *_, **__: [lossless])
    folder = tmp_path / "demo"
    metrics = video.run_demo(folder, config=SMALL, prior_config=SMALL_PRIOR)
    assert metrics is not None
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (metrics["grid"], metrics["train_clips"], metrics["test_clips"]) == ([5, 2, 2], 12, 3)
    names = [size["name"] for size in metrics["sizes"]]
    assert names[0] == "animated WebP, lossless"
    assert names[-4:] == ["indices, uniform", "indices, static", "indices, adaptive", "indices, learned prior"]
    assert metrics["sizes"][-1]["bytes"] == (folder / "clips.fvq").stat().st_size
    assert metrics["sizes"][-4]["bytes"] == math.ceil(3 * 20 * 3 / 8)
    page = (folder / "index.html").read_text()
    for name in ("reconstructions", "samples", "completions"):
        assert f'src="media/{name}.webp"' in page
        assert f'src="{name}.png"' in page
    assert all(f"<td>{name}</td>" in page for name in names)

    with pytest.raises(CheckpointError, match="holds a finished demo: resume it"):
        video.run_demo(folder, config=SMALL, prior_config=SMALL_PRIOR)
    with pytest.raises(ConfigError, match="resume and overwrite exclude each other"):
        video.run_demo(folder, resume=True, overwrite=True)
    (folder / "mine.txt").write_text("to keep")
    room._delete(folder)
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"mine.txt", ".demo"} <= left
    assert not left & {"index.html", "metrics.json", "clips.fvq", "metrics.jsonl", "samples.png", "samples.webp"}
    assert not list((folder / "checkpoints").glob("step-*"))


def test_the_command_line_takes_the_demo_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_demo(
        folder: Path, *, resume: bool, overwrite: bool, steps: int = 0, prior_steps: int = 0
    ) -> dict[str, int]:
        print(folder, steps, prior_steps)
        return {}

    monkeypatch.setattr(video, "run_demo", run_demo)
    assert main(["demo", "video", f"--out={tmp_path}", "--steps=3", "--prior-steps=2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path} 3 2\n"
    assert main(["demo", "video", "--classifier-steps=3"]) != 0
    assert "the demo video has no such steps" in capsys.readouterr().err
