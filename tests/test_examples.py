"""The examples run as a user would run them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvq
from fastvq.cli import main as cli
from fastvq.data.audio_io import read_signal
from fastvq.data.image_io import IMAGES

from .demo.clips import few_clips
from .modalities.folders import FOLDERS
from .tiny_runs import few_clothes, tiny_run

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs an example here, on few of the shipped data, and returns what it prints."""
    few_clips(monkeypatch)
    few_clothes(monkeypatch)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_train_vqvae(tmp_path: Path, example: Callable[..., str]) -> None:
    picture = tmp_path / "out.png"
    printed = example("train_vqvae.py", "--steps=3", f"--out={picture}")
    assert "step 3: " in printed
    assert "an image as 49 indices: [" in printed
    with Image.open(picture) as image:
        assert image.width > 150


def test_compress(tmp_path: Path, example: Callable[..., str]) -> None:
    coded = tmp_path / "out.fvq"
    printed = example("compress.py", "--steps=3", "--prior-steps=3", f"--out={coded}", f"--run={tmp_path / 'run'}")
    assert f"out.fvq: {coded.stat().st_size} bytes for 15680 pixels" in printed
    for model in ("uniform", "huffman", "static", "adaptive", "prior"):
        assert f"\n{model}: " in f"\n{printed}"
    assert "decoded again: " in printed


def test_train_prior(tmp_path: Path, example: Callable[..., str]) -> None:
    printed = example("train_prior.py", "--steps=3", "--prior-steps=3", f"--run={tmp_path / 'run'}")
    assert "bits per index; a uniform prior has 9.00" in printed
    assert "indices (3, 7, 7) become images (3, 1, 28, 28)" in printed
    for name in ("samples.png", "completions.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert min(image.size) > 150


def test_train_vqvae2(tmp_path: Path, example: Callable[..., str]) -> None:
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for n in range(120):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "images" / f"{n}.png")
    folders = [f"--{name}={tmp_path / 'images'}" for name in ("data", "held-out")] + [f"--run={tmp_path / 'run'}"]
    printed = example("train_vqvae2.py", "--image-size=16", "--steps=1", "--prior-steps=1", *folders)
    assert "one: 16 indices of 181 codes, 120 bits an image" in printed
    assert "two: 20 indices of 64 codes, 120 bits an image" in printed
    assert re.search(r"coarse codes leave \d+\.\d% of the variance", printed)
    assert len(re.findall(r"negative ELBO \d+\.\d+ bits per dimension", printed)) == 3
    with Image.open(tmp_path / "run" / "mistakes.png") as image:
        assert min(image.size) > 150


def test_train_video(tmp_path: Path, example: Callable[..., str]) -> None:
    printed = example("train_video.py", "--steps=1", "--prior-steps=1", f"--run={tmp_path / 'run'}")
    assert "bits per index; a uniform prior has 9.00" in printed
    assert "clips (3, 3, 17, 32, 32) become indices (3, 5, 8, 8)" in printed
    assert "equal indices of first frames: 100.0%" in printed
    with Image.open(tmp_path / "run" / "decoded.webp") as image:
        assert image.n_frames == 17
    assert (tmp_path / "run" / "samples.gif").exists()


def test_semantic_ids(example: Callable[..., str]) -> None:
    printed = example("semantic_ids.py", "--items=500", "--dim=8", "--size=12")
    found = re.search(r"nearest codes: (\d+) of 500 items .*unique: (\d+) items moved", printed, re.S)
    assert found
    assert 0 < int(found[2]) < int(found[1])


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def printed(tmp_path: Path, *command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    script = str(EXAMPLES / "train_lightning.py")
    text = printed(tmp_path, sys.executable, script, "--steps=4", "--devices=2")
    values = re.search(r"after 4 steps: .*'perplexity': '([\d.]+)', 'usage': '([\d.]+)'", text)
    assert values is not None, text
    assert 1 < float(values[1]) <= 512
    assert 0 < float(values[2]) <= 1


def test_train_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = str(EXAMPLES / "train_accelerate.py")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    text = printed(
        tmp_path, sys.executable, *launch, "--mixed_precision=no", "--dynamo_backend=no", script, "--steps=2", "--cpu"
    )
    assert re.fullmatch(r"step 2: [\d.]+ dB, perplexity \d+, usage \d+%\n", text), text


@pytest.mark.parametrize("options", [[], ["--learnable"]])
def test_train_fsdp(tmp_path: Path, options: list[str]) -> None:
    text = printed(tmp_path, *TORCHRUN, str(EXAMPLES / "train_fsdp.py"), "--steps=2", *options)
    assert re.fullmatch(r"after 2 steps: loss [\d.]+, perplexity \d+\n", text), text


def test_tokenize_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    run, images = tiny_run(tmp_path, count=12, grayscale=True)
    command = [sys.executable, str(EXAMPLES / "tokenize_ray.py"), "--run", str(run), "--out", "out", str(images)]
    done = subprocess.run([*command, "--workers=1"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out").to_pydict()
    model = fastvq.load(run)
    for path, indices in zip(table["path"], table["indices"], strict=True):
        pixels = IMAGES.read(path, model.config.example_format, None)
        assert model.encode(pixels)[0].tolist() == indices.tolist()
    assert len(table["path"]) == 12


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_tested_here(path: Path) -> None:
    assert f"test_{path.stem}" in globals()


def test_train_audio(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_audio.py"), "--steps=2", "--out", str(tmp_path / "out.wav")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 2: loss " in done.stdout
    assert "8 stages, 3.2 kbit/s: log-mel distance " in done.stdout
    assert read_signal(tmp_path / "out.wav", 16000, 1).shape == (1, 16 * 20480)


def test_stream_audio(tmp_path: Path) -> None:
    FOLDERS["audio"].write(tmp_path / "data")
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in FOLDERS["audio"].settings.items()]
    train = ["train", f"--out={tmp_path / 'run'}", f"--data={tmp_path / 'data'}", *settings, "--codebook-size=8"]
    assert cli.main([*train, "--dim=4", "--steps=1", "--batch-size=4", "--quiet"]) == 0
    files = [str(tmp_path / "run"), str(tmp_path / "data" / "s1.flac")]
    command = [sys.executable, str(EXAMPLES / "stream_audio.py"), *files, "--stages=2", "--chunk-ms=5", "--out=out.wav"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 of 8 indices differ from those of the whole file" in done.stdout
    assert "x real time" in done.stdout
    assert read_signal(tmp_path / "out.wav", 8000, 1).shape == (1, 128)
