"""Commands on finished runs, as a user types them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.cli.main import main
from fastvq.runs import figures, plots
from fastvq.runs.train_prior import train_prior
from fastvq.training import Trainer, load_examples
from fastvq.training.checkpoint import load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.metrics import read_metrics

from ..tiny_runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, _ = tiny_run(tmp_path_factory.mktemp("runs"), count=30, grayscale=True)
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1), progress=False)
    return run


def test_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert main(["evaluate", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    psnr = json.loads(out.read_text())["measures"]["psnr_db"]["value"]
    [line] = [line for line in printed.out.splitlines() if line.startswith("PSNR of the mean")]
    assert f"{psnr:.2f}" in line.split()
    assert printed.err == ""
    assert main(["evaluate", str(run), "--out", "numbers.txt"]) == 2
    assert capsys.readouterr().err == "fastvq: --out must end in .json, got numbers.txt\n"
    assert main(["evaluate", str(run), "--device", "nowhere"]) == 2
    assert "fastvq: --device: 'nowhere' cannot be used here" in capsys.readouterr().err


def test_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "deep" / "b")
    shutil.copytree(run, tmp_path / "a")
    shutil.copytree(run / "checkpoints", tmp_path / "broken" / "checkpoints")
    for file in (tmp_path / "broken" / "checkpoints").rglob("checkpoint.json"):
        file.write_text("{}")
    assert main(["runs", str(tmp_path)]) == 0
    head, *lines, blank, broken = capsys.readouterr().out.splitlines()
    names = ("run", "data", "bottleneck", "steps", "quality", "perplexity", "prior", "bits", "size", "date")
    assert tuple(head.split()) == names
    assert [line.split()[:4] for line in lines] == [[name, "images", "vq", "3/3"] for name in ("a", "deep/b")]
    assert blank == ""
    assert broken.startswith("broken: ")
    assert "is damaged" in broken
    assert main(["runs", str(tmp_path), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    test = read_metrics(run / "metrics.jsonl")[-1]
    assert [record["run"] for record in records] == ["a", "broken", "deep/b"]
    assert (records[0]["measure"], records[0]["value"]) == ("psnr_db", test["psnr_db"])
    assert records[0]["prior_bits"] == read_metrics(run / "prior" / "metrics.jsonl")[-1]["bits_per_index"]
    assert records[0]["bytes"] == sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())
    resume = ["train", f"--out={tmp_path / 'a'}", "--resume", "--steps=4", "--quiet"]
    assert main(resume) == 2
    assert "are lost: copy the run first, and give --overwrite" in capsys.readouterr().err
    assert main([*resume, "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["prior_bits"] is None  # of the model before
    assert main(["runs", str(run)]) == 0  # a run itself
    assert capsys.readouterr().out.splitlines()[1].startswith("run ")


def test_runs_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run: fastvq train --out {tmp_path / 'mine'} makes one" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "absent")]) == 2
    assert "absent does not exist: give a folder of runs" in capsys.readouterr().err


def test_a_grid_of_samples(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run), "--count=5", "--out", str(tmp_path / "grid.png")]) == 0
    assert capsys.readouterr().out == f"picture of 5 samples: {tmp_path / 'grid.png'}\n"
    title, caption = figures.texts_of(tmp_path / "grid.png")
    assert title == "run: 5 samples"
    assert caption.startswith("Indices sampled")


def test_more_steps_say_what_the_schedule_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save_figure", lambda *_: None)  # the pictures have tests of their own
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(["train", "--out", str(copy), "--resume", "--steps", "6", "--overwrite", "--quiet"]) == 0
    printed = capsys.readouterr()
    # 3e-3 (1 + cos(2 pi / 3)) / 2 at step 2 of 3, 3e-3 / 2 at step 3 of 6.
    assert printed.out.splitlines()[0] == (
        "resuming at step 3 of 3, to 6: the learning rate goes on as in a training of 6 steps, from 0.00075 to 0.0015"
        " at once"
    )
    assert printed.err == ""
    assert main(["train", "--out", str(copy), "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "step 6 of 6: the training is finished; --steps 12 would continue it"
    )
    assert main(["train", "--out", str(copy), "--resume", "--steps", "4"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "fastvq: --steps must be more than the 6 that the run has done, got 4\n")
    assert main(["prior", str(run), "--resume", "--steps", "2", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("resuming at step 1 of 1, to 2: the learning rate goes on")
    assert "files that were coded with the prior of step 1 cannot be decoded afterwards" in printed.out
    assert printed.err == ""


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(run), str(tmp_path / "tiny.onnx")]) == 0
    printed = capsys.readouterr()
    assert "tiny-encode.onnx: images (B, 1, 16, 16), float32 in [0, 1] -> indices (B, 4, 4)\n" in printed.out
    assert "100.0% of the indices are equal" in printed.out
    assert printed.err == ""
    model = fastvq.load(run)
    indices = model.encode(torch.rand(5, 1, 16, 16))
    session = onnxruntime.InferenceSession(str(tmp_path / "tiny-decode.onnx"))
    (images,) = session.run(["images"], {"indices": indices.numpy()})
    torch.testing.assert_close(torch.from_numpy(images), model.decode(indices), atol=1e-5, rtol=0)


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    assert main(["export", str(run), str(tmp_path / "x.txt")]) == 2
    assert "out must end in .onnx" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "absent"), str(tmp_path / "x.onnx")]) == 2
    assert "absent holds no checkpoint: it does not exist" in capsys.readouterr().err
    config = dataclasses.replace(load_latest(run).config, bottleneck="none", steps=1)
    Trainer(config, load_examples(config), tmp_path / "plain").fit(progress=False)
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "x.onnx")]) == 2
    assert "was trained without a bottleneck: it has no indices" in capsys.readouterr().err
