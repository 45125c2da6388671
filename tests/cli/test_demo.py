"""`fastvq demo`, end to end with tiny settings."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvq.cli.main import main
from fastvq.demo import images as demo
from fastvq.training.checkpoint import checkpoint_folders
from fastvq.training.config import PriorConfig

SMALL_PRIOR = PriorConfig(dim=16, depth=1)


SHORT_DEMO = ["--ceiling-steps=2", "--prior-steps=2", "--classifier-steps=2"]


PICTURES = ("reconstructions", "curves", "usage", "indices", "samples", "completions", "neighbors")


def test_demo_writes_pictures_metrics_a_page_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    run = tmp_path / "demo"
    monkeypatch.setattr(demo, "DEMO_PRIOR", SMALL_PRIOR)
    assert main(["demo", f"--out={run}", *SHORT_DEMO, "--steps=3"]) == 0
    drawn = {f"demo/{name}.png": 1 for name in PICTURES} | {"prior/curves.png": 1}
    assert calls == {**drawn, "VectorQuantize": 1, "NoBottleneck": 1, "TransformerPrior": 1}  # each once
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
    for name in (*(f"{name}.png" for name in PICTURES), "prior/curves.png"):
        assert (run / name).stat().st_size > 3_000
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


@pytest.mark.usefixtures("small_demo")
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


def test_demo_leaves_other_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    assert main(["demo", f"--out={tmp_path}", "--steps=1", "--ceiling-steps=1"]) == 2
    assert "holds a run that is not a demo" in capsys.readouterr().err
    assert checkpoint.exists()
