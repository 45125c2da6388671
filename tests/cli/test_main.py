"""The command line, end to end with tiny settings: in this process, and in others that are interrupted or killed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastvq.cli.main import _with_options, main
from fastvq.demo import images as demo
from fastvq.training.checkpoint import checkpoint_folders
from fastvq.training.config import PriorConfig
from fastvq.training.metrics import read_metrics

TINY = [
    "--codebook-size=16", "--dim=8", "--width=8", "--residual-width=4", "--encoder-blocks=1", "--decoder-blocks=1",
    "--batch-size=8", "--warmup-steps=2", "--log-every=2",
]  # fmt: skip
PATIENCE_S = 120


def folder_of_images(root: Path) -> Path:
    random = np.random.default_rng(0)
    root.mkdir()
    for n in range(40):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(root / f"{n:02d}.png")
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path / "images")


def start_training(run: Path, images: Path, *, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastvq", "train", f"--out={run}", f"--data={images}", "--image-size=16"]
    return start([*command, *TINY, f"--steps={steps}", "--evaluate-every=1000000", "--checkpoint-every=10"])


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a process with one thread: two on cores that others use as well spend their time waiting."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_record(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return when metrics.jsonl holds a record of `step` or later."""
    deadline = time.monotonic() + PATIENCE_S
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or all(record["step"] < step for record in read_metrics(metrics)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no record of step {step}"
        os.sched_yield()


def final_state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folders(run)[-1] / "state.safetensors")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


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
    arguments = ["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=3"]
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


@pytest.mark.parametrize(
    "arguments",
    [
        *(["train", "--out", ""], ["train", "--out="], ["demo", "--out", ""], ["evaluate", "r", "--out="]),
        *(
            ["bench", "--out", ""],
            ["sample", "r", "--out", ""],
            ["encode", "a.png", "", "--run=r"],
            ["decode", "", "x"],
        ),
    ],
    ids=" ".join,
)
def test_empty_arguments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """An empty path is the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert "must not be empty" in error
    assert ("--out" in error) == any("--out" in argument for argument in arguments)
    assert not list(tmp_path.iterdir())


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


def test_nobody_reads_the_output_any_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(options: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fastvq.cli.encode.run", broken)
    assert main(["encode", "a.npy", "a.fvq"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")]
)
def test_used_up_memory_is_an_error_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr("fastvq.cli.encode.run", fail)
    assert main(["encode", "a.npy", "a.fvq"]) == 2
    assert re.fullmatch(r"fastvq: out of memory: .*\n", capsys.readouterr().err)


def test_endings_are_read_in_any_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, coded, back = tmp_path / "I.NPY", tmp_path / "i.FVQ", tmp_path / "BACK.NPY"
    with source.open("wb") as file:
        np.save(file, np.arange(6).reshape(2, 3))
    assert main(["encode", str(source), str(coded)]) == 0
    assert main(["decode", str(coded), str(back)]) == 0
    with back.open("rb") as file:
        assert np.array_equal(np.load(file), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "a.png", "a.fvq", "--run=r", "--data=d"], "--data: only says where held-out examples are"),
        (["reconstruct", "r", "a.png", "--out=x.png", "--data=d"], "--data: only says where held-out examples are"),
        (["encode", "./held-out", "a.fvq", "--run=r"], "the run's held-out examples are --held-out"),
        (["reconstruct", "r", "held-out/", "--out=x.png"], "the run's held-out examples are --held-out"),
        (["prior", "r", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["demo", "--out=r", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_what_has_no_effect_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the number of times that a picture is drawn or a model evaluated, by name."""
    from fastvq.runs import plots
    from fastvq.training import prior, trainer

    counts: Counter[str] = Counter()

    def counting(module: ModuleType, function: str, name: Callable[..., str]) -> None:
        original = getattr(module, function)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name(*arguments)] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, call)

    counting(plots, "save_figure", lambda figure, path, *_: f"{path.parent.name}/{path.name}")
    counting(trainer, "evaluate", lambda model, *_: type(model.bottleneck).__name__)
    counting(prior, "bits_per_index", lambda model, *_: type(model).__name__)
    return counts


def test_the_last_step_is_evaluated_and_drawn_once(tmp_path: Path, images: Path, calls: Counter[str]) -> None:
    arguments = ["train", f"--out={tmp_path / 'run'}", f"--data={images}", "--image-size=16", *TINY, "--steps=6"]
    assert main([*arguments, "--evaluate-every=3"]) == 0
    once = {"run/curves.png": 1, "run/usage.png": 1, "run/indices.png": 1}
    assert calls == {"VectorQuantize": 2, "run/reconstructions.png": 2, **once}
    calls.clear()
    assert main(["train", f"--out={tmp_path / 'run'}", "--resume"]) == 0
    assert calls == {"VectorQuantize": 1, "run/reconstructions.png": 1, **once}


def test_the_demo_evaluates_and_draws_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    monkeypatch.setattr(demo, "DEMO_PRIOR", SMALL_PRIOR)
    assert main(["demo", f"--out={tmp_path / 'demo'}", *SHORT_DEMO, "--steps=2"]) == 0
    pictures = ("reconstructions", "curves", "usage", "indices", "samples", "completions", "neighbors")
    expected = {f"demo/{name}.png": 1 for name in pictures} | {"prior/curves.png": 1}
    assert calls == {**expected, "VectorQuantize": 1, "NoBottleneck": 1, "TransformerPrior": 1}


SMALL_PRIOR = PriorConfig(dim=16, depth=1)
SHORT_DEMO = ["--ceiling-steps=2", "--prior-steps=2", "--classifier-steps=2"]


def test_demo_writes_pictures_metrics_a_page_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "demo"
    monkeypatch.setattr(demo, "DEMO_PRIOR", SMALL_PRIOR)
    assert main(["demo", f"--out={run}", *SHORT_DEMO, "--steps=3"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 < metrics["psnr_db"] < 40
    assert 0 < metrics["ceiling_psnr_db"] < 40
    assert 1 <= metrics["perplexity"] <= 512
    assert (metrics["steps"], metrics["ceiling_steps"], metrics["prior_steps"]) == (3, 2, 2)
    assert (metrics["indices_per_image"], metrics["codebook_size"]) == (49, 512)
    assert (metrics["train_images"], metrics["test_images"]) == (5700, 1000)
    assert 0 < metrics["seconds"] < metrics["total_seconds"]
    assert metrics["settings"]["batch_size"] > 0
    bits = metrics["bits_per_index"]
    assert bits["uniform"] == 9.0
    assert 0 < bits["adaptive"] < bits["static"]
    assert bits["static"] - 0.5 < bits["huffman"] < bits["static"] + 1
    assert metrics["kl_bits_per_image"] == 441.0
    assert metrics["prior_bits_per_image"] == pytest.approx(49 * bits["prior"])
    assert metrics["bits_per_dimension"]["uniform"] == pytest.approx(441 / 784)
    for name in ("sample_agreement", "plain_sample_agreement", "real_agreement", "reconstruction_agreement"):
        assert 0 <= metrics[name] <= 1
    sizes = {size["name"]: size for size in metrics["sizes"]}
    ideal, file = (next(size["bytes"] for name, size in sizes.items() if text in name) for text in ("ideal, c", "file"))
    assert file == metrics["coded_bytes"]
    labels = 1000 * math.log2(10) / 8
    assert abs(file - ideal - labels) <= 0.005 * (ideal + labels) + 64
    assert sizes["PNG"]["bytes"] < sizes["pixels"]["bytes"] == 784_000
    page = (run / "index.html").read_text()
    shown = re.findall(r'src="([^"]+)"', page)
    assert len(shown) == 8
    assert all((run / name).exists() for name in shown)
    assert f"{metrics['psnr_db']:.2f} dB" in page
    assert "http" not in page
    assert 0 < bits["prior"] < 10
    assert metrics["coded_bytes"] == (run / "images.fvq").stat().st_size < metrics["pixel_bytes"] / 10
    for name in (
        "reconstructions.png",
        "curves.png",
        "usage.png",
        "indices.png",
        "samples.png",
        "completions.png",
        "neighbors.png",
        "prior/curves.png",
    ):
        assert (run / name).stat().st_size > 10_000
    table = capsys.readouterr().out
    assert f"{metrics['psnr_db']:.2f} dB" in table
    assert "49 below 512, 441 bits" in table


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo learn from a few images."""
    from fastvq.runs import load

    everything = demo.load_examples(demo.DEMO)
    few = dataclasses.replace(
        everything,
        train=everything.train[:40],
        train_labels=everything.train_labels[:40],
        test=everything.test[:20],
        test_labels=everything.test_labels[:20],
        test_names=everything.test_names[:20],
    )
    for module in (demo, load):
        monkeypatch.setattr(module, "load_examples", lambda config: few)
    monkeypatch.setattr(demo, "DEMO", dataclasses.replace(demo.DEMO, codebook_size=16, batch_size=8))
    monkeypatch.setattr(demo, "DEMO_PRIOR", dataclasses.replace(SMALL_PRIOR, batch_size=8))


@pytest.mark.usefixtures("small_demo")
def test_a_demo_is_replaced_only_on_request_and_when_its_successor_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "demo"
    monkeypatch.setattr(demo, "judge_samples", lambda *_, **__: dict.fromkeys(JUDGED))
    monkeypatch.setattr(demo, "measure_sizes", lambda *_, **__: (dict.fromkeys(MODELS, 1.0), []))
    for name in ("picture_prior_samples", "picture_run"):
        monkeypatch.setattr(demo, name, lambda *_, **__: None)
    arguments = ["demo", f"--out={run}", *SHORT_DEMO, "--steps=2"]
    assert main(arguments) == 0
    (run / "mine.txt").write_text("mine")
    coded = (run / "images.fvq").read_bytes()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(arguments) == 2
    assert "holds a finished demo: resume it (--resume), replace it (--overwrite)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train_prior", lambda *_, **__: None)
        for _ in range(2):
            assert main([*arguments, "--overwrite"]) == 130
            assert (run / "earlier" / "images.fvq").read_bytes() == coded
            assert not (run / "images.fvq").exists()
    decoded = tmp_path / "decoded.npy"
    assert main(["decode", str(run / "earlier" / "images.fvq"), str(decoded), f"--run={run / 'earlier'}"]) == 0
    assert main(arguments) == 2
    assert "holds an unfinished demo" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert not (run / "earlier").exists()
    assert (run / "mine.txt").read_text() == "mine"
    assert (run / "images.fvq").read_bytes() == coded


JUDGED = ("sample_agreement", "plain_sample_agreement", "real_agreement", "reconstruction_agreement")
MODELS = ("uniform", "huffman", "static", "adaptive", "prior")
STAGES = ("picture_reconstructions", "picture_run", "picture_prior", "picture_prior_samples",
          "judge_samples", "encode_held_out", "measure_sizes", "write_demo_page")  # fmt: skip


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_ends_the_demo_at_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Whatever stage it arrives in, no later one begins, the status is 130 and what was trained is saved."""
    reached: list[str] = []

    def stub(name: str, result: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            reached.append(name)
            if name == stage:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            return result

        return call

    results = {"judge_samples": dict.fromkeys(JUDGED), "measure_sizes": (dict.fromkeys(MODELS, 1.0), []),
               "encode_held_out": ["coded"]}  # fmt: skip
    for name in STAGES:
        monkeypatch.setattr(demo, name, stub(name, results.get(name)))
    (tmp_path / "images.fvq").touch()
    assert main(["demo", f"--out={tmp_path}", *SHORT_DEMO, "--steps=2"]) == 130
    assert reached[-1] == stage
    assert checkpoint_folders(tmp_path)[-1].name == "step-00000002"


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


@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", "2"), ("RANK", "1")])
@pytest.mark.parametrize("command", ["train", "prior", "encode", "decode", "sample", "reconstruct", "demo", "bench"])
def test_one_of_several_ranks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, variable: str,
    value: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    arguments = {"train": ["--out=run"], "encode": ["a", "b"], "decode": ["a", "b"], "prior": ["run"],
                 "sample": ["run", "--out=x.png"], "reconstruct": ["run", "--out=x.png"]}  # fmt: skip
    assert main([command, *arguments.get(command, [])]) == 2
    assert f"{variable}={value} says that this is one of several" in capsys.readouterr().err
    monkeypatch.setenv(variable, "1" if variable == "WORLD_SIZE" else "0")
    assert main(["decode", str(tmp_path / "absent"), str(tmp_path / "out.npy")]) == 2
    assert "one of several" not in capsys.readouterr().err


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


def test_an_interrupted_demo_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvq.training.trainer import Trainer

    original = Trainer.train_step
    stops = iter([2, 1])
    stop_at = next(stops)

    def step_and_interrupt(trainer: Trainer) -> None:
        original(trainer)
        if trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    arguments = ["demo", f"--out={tmp_path}", *SHORT_DEMO, "--steps=4", "--ceiling-steps=3"]
    monkeypatch.setattr(demo, "DEMO_PRIOR", SMALL_PRIOR)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_interrupt)
        assert main(arguments) == 130
        assert not (tmp_path / "ceiling").exists()
        stop_at = next(stops)
        assert main([*arguments, "--resume"]) == 130
        assert not (tmp_path / "metrics.json").exists()
    assert main([*arguments, "--resume"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["ceiling_steps"]) == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out=RUN", "--data=nowhere"], "nowhere doesn't exist"),
        (["train", "--out=RUN", "--codebook-size=0"], "--codebook-size must be at least 1, got 0"),
        (["train", "--out=RUN", "--steps=-5"], "--steps must be at least 1, got -5"),
        (["train", "--out=RUN", "--resume"], "holds no checkpoint"),
        (["train", "--out=RUN", "--device=warp"], "--device: 'warp'"),
        (["reconstruct", "RUN", "--out=x.png"], "holds no checkpoint"),
        (["demo", "--out=RUN", "--steps=0"], "--steps must be at least 1"),
        (["prior", "RUN", "--label-dropout=1"], "--label-dropout must be at least 0 and below 1, got 1.0"),
        (["prior", "RUN"], "holds no checkpoint"),
        (["sample", "RUN", "--out=x.png"], "holds no checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = tmp_path / "run"
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvq: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "fastvq: the following arguments are required: COMMAND (see fastvq --help)"),
        (["train"], "fastvq train: the following arguments are required: --out (see fastvq train --help)"),
        (["decode", "a"], "fastvq decode: the following arguments are required: OUT (see fastvq decode --help)"),
        (["info", "--wrong"], "fastvq: unrecognized arguments: --wrong (see fastvq --help)"),
        (
            ["train", "--out=x", "--steps=y"],
            "fastvq train: argument --steps: invalid int value: 'y' (see fastvq train --help)",
        ),
    ],
)
def test_mistyped_commands_are_one_line_that_names_the_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("batch_size must be at most 2", "--batch-size must be at most 2"),
        ("steps: must be at least 1, as batch_size", "--steps: must be at least 1, as --batch-size"),
        ("a run of 3 steps", "a run of 3 steps"),
        (
            "batch_size/steps.png is no image, batch_size.png neither",
            "batch_size/steps.png is no image, batch_size.png neither",
        ),
    ],
)
def test_errors_name_options_as_they_are_typed(message: str, shown: str) -> None:
    assert _with_options(message, {"steps": "--steps", "batch_size": "--batch-size"}) == shown


def test_an_image_that_is_none_is_named(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=1"])
    (tmp_path / "fake.png").write_text("no image")
    assert main(["reconstruct", str(run), str(tmp_path / "fake.png"), "--out=x.png"]) == 2
    assert "fake.png is not a readable image" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    run = tmp_path / "run"
    assert main(["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=1"]) == 2
    assert 'safetensors is missing: pip install "fastvq-torch[train]"' in capsys.readouterr().err


def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    extras = ("safetensors", "tqdm", "matplotlib", "PIL", "tensorboard")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({extras!r}))
import fastvq, fastvq.models, fastvq.data, fastvq.training, fastvq.runs.plots, fastvq.cli.main
fastvq.data.load_fashion_mnist()
raise SystemExit(fastvq.cli.main.main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_demo_leaves_other_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    assert main(["demo", f"--out={tmp_path}", "--steps=1", "--ceiling-steps=1"]) == 2
    assert "holds a run that is not a demo" in capsys.readouterr().err
    assert checkpoint.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", f"--out={tmp_path / 'file' / 'run'}", "--steps=1", "--ceiling-steps=1"]) == 2
    assert "Not a directory" in capsys.readouterr().err
