"""`fastvq train`, end to end with tiny settings, in this process and in others that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvq.cli.main import main
from fastvq.training.checkpoint import checkpoint_folders
from fastvq.training.metrics import read_metrics

from .tiny import PATIENCE_S, TINY, final_state, start, start_training, wait_for_record


def test_train_then_reconstruct(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = ["train", f"--out={run}", f"--data={images}", "--image-size=16", "--no-grayscale", *TINY, "--steps=6"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "held-out images: " in output.out
    assert "loss" in output.err
    assert "perplexity" in output.err
    for name in ("reconstructions.png", "curves.png", "usage.png", "indices.png", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0

    picture = tmp_path / "held_out.png"
    assert main(["reconstruct", str(run), f"--out={picture}"]) == 0
    assert picture.exists()
    picture.unlink()
    assert main(["reconstruct", str(run), str(images / "00.png"), str(images / "01.png"), f"--out={picture}"]) == 0
    assert picture.exists()
    lines = capsys.readouterr().out.splitlines()
    assert sum(".png: " in line and " dB" in line for line in lines) == 2


def test_train_without_a_bottleneck(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = [
        "train",
        f"--out={run}",
        f"--data={images}",
        "--image-size=16",
        *(option for option in TINY if not option.startswith("--codebook-size")),
        "--steps=3",
    ]
    assert main([*arguments, "--bottleneck=none"]) == 0
    assert "perplexity" not in capsys.readouterr().out
    assert (run / "curves.png").exists()
    assert not (run / "indices.png").exists()


def test_a_run_lies_outside_of_its_images(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--image-size=16", *TINY, "--steps=2"]
    monkeypatch.chdir(images)
    for out in (images / "run", images, Path("run"), Path()):
        assert main(["train", f"--out={out}", "--data=.", *arguments]) == 2
        assert f"--out: {out} lies in {images}, whose files" in capsys.readouterr().err
    assert len(list(images.iterdir())) == 40
    assert main(["train", "--out=.run", "--data=.", *arguments]) == 0
    assert main(["train", "--out=.run", "--resume", "--steps=3"]) == 0


def test_metrics_of_something_else_are_kept(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
    assert main(["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=2"]) == 2
    assert "metrics.jsonl was not written by a training in this folder" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["curves.png", "config.toml", "INDEX.HTML"])
def test_files_of_somebody_else_are_kept(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / name).write_text("mine")
    (run / "notes.txt").write_text("no run writes such a file")
    arguments = ["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=2"]
    assert main(arguments) == 2
    assert f"{name} was not written by a training in this folder" in capsys.readouterr().err
    assert (run / name).read_text() == "mine"
    assert len(list(run.iterdir())) == 2


def test_a_device_is_refused_before_images_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--out={tmp_path / 'run'}", "--data=nowhere", "--device=warp"]) == 2
    assert "--device: 'warp'" in capsys.readouterr().err


def test_unreadable_files_that_come_later_change_nothing(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=2"]
    assert main(arguments) == 0
    (images / "torn.jpg").write_bytes(b"")
    capsys.readouterr()
    assert main(["reconstruct", str(run), "--out", str(tmp_path / "x.png")]) == 0
    assert "skipped 1 file of 41" in capsys.readouterr().err
    assert main(["train", f"--out={run}", "--resume", "--steps=3"]) == 2
    assert "--skip-unreadable leaves such files out" in capsys.readouterr().err
    assert main(["train", f"--out={run}", "--resume", "--steps=3", "--skip-unreadable"]) == 0
    (images / "torn.jpg").unlink()
    assert main(["train", f"--out={run}", "--resume", "--steps=4", "--no-skip-unreadable"]) == 0
    (images / "00.png").write_bytes(b"")
    assert main(["reconstruct", str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert "the data differ" in capsys.readouterr().err


def test_a_folder_is_color_by_default_and_resumes_from_anywhere(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--out=run", "--data=images", *TINY, "--steps=2"]) == 0
    config = json.loads((checkpoint_folders(Path("run"))[-1] / "checkpoint.json").read_text())["config"]
    assert (config["image_size"], config["grayscale"]) == (64, False)
    monkeypatch.chdir(images)
    assert main(["train", "--out=../run", "--resume"]) == 0
    assert main(["train", "--out=../run", "--resume", "--data=../images"]) == 0


def test_the_last_step_is_evaluated_and_drawn_once(tmp_path: Path, images: Path, calls: Counter[str]) -> None:
    arguments = ["train", f"--out={tmp_path / 'run'}", f"--data={images}", "--image-size=16", *TINY, "--steps=6"]
    assert main([*arguments, "--evaluate-every=3"]) == 0
    once = {"run/curves.png": 1, "run/usage.png": 1, "run/indices.png": 1}
    assert calls == {"VectorQuantize": 2, "run/reconstructions.png": 2, **once}
    calls.clear()
    assert main(["train", f"--out={tmp_path / 'run'}", "--resume"]) == 0
    assert calls == {"VectorQuantize": 1, "run/reconstructions.png": 1, **once}


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, images: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = 150
    process = start_training(killed, images, steps=steps)
    wait_for_record(process, killed, 25)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    reached = max(record["step"] for record in read_metrics(killed / "metrics.jsonl"))
    saved = int(checkpoint_folders(killed)[-1].name.removeprefix("step-"))
    assert reached < steps, "the run ended before it was killed"
    assert reached - 11 <= saved <= reached + 1

    resuming = start([sys.executable, "-m", "fastvq", "train", f"--out={killed}", "--resume"])
    for process in (resuming, start_training(whole, images, steps=steps)):
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
    expected, resumed = final_state(whole), final_state(killed)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")


def test_of_two_trainings_at_once_the_second_is_refused(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    process = start_training(run, images, steps=100_000)
    try:
        wait_for_record(process, run, 14)  # after a checkpoint
        for arguments in (["--resume"], [f"--data={images}", "--image-size=16", *TINY, "--steps=5"]):
            assert main(["train", f"--out={run}", *arguments]) == 2
            assert f"{run} is being written by process {process.pid} on " in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)
    steps = int(checkpoint_folders(run)[-1].name.removeprefix("step-")) + 1
    assert main(["train", f"--out={run}", "--resume", f"--steps={steps}"]) == 0


def test_a_run_and_its_data_move(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=4"]) == 0
    moved_run, moved_images = tmp_path / "other" / "run", tmp_path / "other" / "images"
    moved_run.parent.mkdir()
    run.rename(moved_run)
    images.rename(moved_images)
    assert main(["train", f"--out={moved_run}", "--resume", "--steps=6"]) == 2
    assert f"{images} doesn't exist" in capsys.readouterr().err
    uses = (["reconstruct", str(moved_run), f"--out={tmp_path / 'x.png'}"],
            ["encode", "--held-out", str(tmp_path / "x.fvq"), f"--run={moved_run}"])  # fmt: skip
    for use in uses:
        assert main(use) == 2
        assert "--data says where they are" in capsys.readouterr().err
        assert main([*use, f"--data={moved_images}"]) == 0
    assert main(["train", f"--out={moved_run}", "--resume", "--steps=6", f"--data={moved_images}"]) == 0
    capsys.readouterr()
    (moved_images / "00.png").unlink()
    for use in uses:
        assert main(use) == 2
        assert f"the data differ from those that {moved_run} was trained on" in capsys.readouterr().err
    photo = moved_images / "01.png"
    before = photo.read_bytes()
    for source in (photo, moved_images):
        assert main(["reconstruct", str(moved_run), str(source), f"--out={photo}"]) == 2
        assert "--out would replace" in capsys.readouterr().err
    assert photo.read_bytes() == before
    assert main(["train", f"--out={moved_run}", "--resume", "--steps=8"]) == 2
    error = capsys.readouterr().err
    assert f"the data differ from those that the run in {moved_run} started with" in error


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_picture_that_fails_ends_no_run(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that matplotlib would take for formulas are drawn as they are; a full disk is a warning."""
    from fastvq.runs import plots

    for path in sorted(images.glob("*.png")):
        path.rename(path.with_name(f"$\\x$_^{{{path.stem}.png"))
    run, arguments = tmp_path / "run", [f"--data={images}", "--image-size=16", *TINY, "--steps=4", "--evaluate-every=2"]
    assert main(["train", f"--out={run}", *arguments]) == 0
    assert "warning" not in capsys.readouterr().err
    assert (run / "reconstructions.png").stat().st_size > 0

    def full(figure: Any, path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(plots, "save_figure", full)
    assert main(["train", f"--out={tmp_path / 'full'}", *arguments]) == 0
    said = capsys.readouterr()
    for picture in ("reconstructions", "curves", "usage", "indices"):
        assert f"fastvq: warning: picture of {picture} failed: [Errno 28] No space left on device" in said.err
    assert "held-out images: " in said.out
    assert checkpoint_folders(tmp_path / "full")[-1].name == "step-00000004"
    assert main(["reconstruct", str(run), f"--out={tmp_path / 'x.png'}"]) == 2


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_an_unfinished_run_is_used_with_a_note(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvq.training.trainer import Trainer

    original = Trainer.train_step

    def step_and_interrupt(trainer: Trainer) -> None:
        original(trainer)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_interrupt)
        assert main(["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=5"]) == 130
    capsys.readouterr()
    note = f"fastvq: warning: {run} is unfinished, 3 of 5 steps: fastvq train --out {run} --resume"
    assert main(["reconstruct", str(run), f"--out={tmp_path / 'x.png'}"]) == 0
    assert note in capsys.readouterr().err
    assert main(["train", f"--out={run}", "--resume"]) == 0
    assert main(["reconstruct", str(run), f"--out={tmp_path / 'x.png'}"]) == 0
    assert "unfinished" not in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    process = start_training(run, images, steps=100_000)
    wait_for_record(process, run, 4)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert f"fastvq train --out {run} --resume" in output
    assert "Traceback" not in errors
    stopped = int(checkpoint_folders(run)[-1].name.removeprefix("step-"))
    assert f"stopped at step {stopped}, saved" in output
    assert stopped < 100_000

    assert main(["train", f"--out={run}", "--resume", "--batch-size=4"]) == 2
    assert "--batch-size from 8 to 4" in capsys.readouterr().err


def test_an_image_that_is_none_is_named(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=1"])
    (tmp_path / "fake.png").write_text("no image")
    assert main(["reconstruct", str(run), str(tmp_path / "fake.png"), "--out=x.png"]) == 2
    assert "fake.png is not a readable image" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", f"--out={tmp_path / 'file' / 'run'}", "--steps=1", "--ceiling-steps=1"]) == 2
    assert "Not a directory" in capsys.readouterr().err
