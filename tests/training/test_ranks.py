"""Trainings on two ranks: equal weights, exact resumption, and the end of a rank."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastvq.cli.main import main
from fastvq.data.order import batch_rows, own_rows
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.runs.encode import encode_files
from fastvq.runs.evaluate import evaluate_run
from fastvq.runs.train_prior import train_prior
from fastvq.training.checkpoint import checkpoint_folders, load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.metrics import read_metrics

from ..forked import run_forked
from ..tiny_runs import tiny_run
from . import together
from .tiny import TINY

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*command: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run([*launcher, *command], text=True, capture_output=True, timeout=300, env=ONE_THREAD)


def trained(scenario: str, folder: Path) -> Path:
    run = run_forked(2, together.__file__, scenario, str(folder))
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("both", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole(both: Path) -> Path:
    return both / "whole"


@pytest.fixture(scope="module")
def resumed(both: Path) -> Path:
    for name, steps in {"vqvae": 7, "prior": 5}.items():
        # A signal that one rank got has stopped both after the same step.
        assert load_latest(both / "stopped" / name, SETTINGS[name]).step == steps
    return trained("resumed", both / "stopped")


SETTINGS = {"vqvae": ImageConfig, "prior": PriorConfig}


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_stop_together_and_resume_bit_for_bit(whole: Path, resumed: Path, name: str) -> None:
    final, expected = (load_latest(folder / name, SETTINGS[name]) for folder in (resumed, whole))
    assert final.step == expected.step == {"vqvae": TINY.steps, "prior": together.PRIOR.steps}[name]
    assert final.same_state(expected)
    assert {"random.cpu", "random.cpu.rank1"} <= final.tensors.keys()
    assert read_metrics(resumed / name / "metrics.jsonl") == read_metrics(whole / name / "metrics.jsonl")


def test_ranks_learn_what_one_process_learns(whole: Path, tmp_path: Path) -> None:
    """Loss and measures of the prior, which replaces no codes at random and has no dropout in its evaluation."""
    alone = together.prior_trainer(tmp_path)
    alone.fit(progress=False)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (whole / "prior", tmp_path))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["bits_per_index"] == pytest.approx(other["bits_per_index"], rel=0.05)


def test_another_number_of_ranks_goes_on(whole: Path) -> None:
    """One process takes up a run of two, and three a run of one."""
    from fastvq.training import Trainer

    from .tiny import tiny_images

    config = load_latest(whole / "vqvae").config
    longer = dataclasses.replace(config, steps=16)
    trainer = Trainer(longer, tiny_images(), whole / "vqvae", resume=True)
    assert trainer.step == TINY.steps
    assert trainer.fit(progress=False)
    assert "random.cpu.rank1" not in load_latest(whole / "vqvae").tensors


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    run = torchrun(together.__file__, "killed", str(tmp_path))
    assert run.returncode != 0
    assert time.monotonic() - start < 60
    assert "RanksError: rank 0: another process has ended; start them again" in run.stderr
    assert [path.name for path in checkpoint_folders(tmp_path / "vqvae")] == ["step-00000004"]


def test_the_commands_run_on_ranks(tmp_path: Path) -> None:
    sizes = ["--width=8", "--residual-width=4", "--dim=8", "--codebook-size=16", "--encoder-blocks=0"]
    steps = ["--steps=2", "--evaluate-every=2", "--checkpoint-every=2"]
    run = torchrun("-m", "fastvq", "train", f"--out={tmp_path / 'run'}", "--data=fashion-mnist", *sizes, *steps)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Fashion-MNIST subset: 5700 training images") == 1
    assert run.stdout.count("held-out images: ") == 1
    run = torchrun("-m", "fastvq", "prior", str(tmp_path / "run"), "--dim=8", "--heads=2", "--depth=1", *steps)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("bits per index") == 1


def test_ranks_divide_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvq.data.order.world_size", lambda: 3)
    monkeypatch.setattr("fastvq.distributed.world_size", lambda: 3)
    whole = batch_rows(4, count=40, batch_size=9, seed=1)
    parts = []
    for rank in range(3):
        monkeypatch.setattr("fastvq.distributed.rank", lambda rank=rank: rank)
        parts.append(own_rows(4, count=40, batch_size=9, seed=1))
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ConfigError, match="batch_size must be a multiple of 3, the number of processes, got 8"):
        own_rows(0, count=40, batch_size=8, seed=1)


def test_evaluation_and_encoding_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, images = tiny_run(tmp_path, count=40, grayscale=True)
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1, heads=2), progress=False)
    monkeypatch.setattr("fastvq.runs.evaluate._BATCH", 7)
    monkeypatch.setattr("fastvq.runs.encode._BATCH", 7)
    evaluate_run(run, tmp_path / "one.json", data=images)
    encode_files(run, images, tmp_path / "one.fvq", model="prior")
    trained("measured", tmp_path)
    assert (tmp_path / "two.fvq").read_bytes() == (tmp_path / "one.fvq").read_bytes()
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["measures"].keys() == one["measures"].keys() - {"rfid"}
    for name, measured in two["measures"].items():
        for end, value in measured.items():
            assert value == pytest.approx(one["measures"][name][end], rel=1e-6, abs=1e-9), (name, end)


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        (
            ["sample", "run", "--out=x"],
            {"WORLD_SIZE": "2", "RANK": "0"},
            "one process runs this command, but WORLD_SIZE=2",
        ),
        (
            ["train", "--out=x"],
            {"WORLD_SIZE": "2"},
            "but RANK, MASTER_ADDR, MASTER_PORT is missing: start them by torchrun",
        ),
        (["train", "--out=x"], {"RANK": "1"}, "RANK=1 says that this is one of several processes, but WORLD_SIZE"),
        (["train", "--out=x"], {"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started 4 processes"),
        (["train", "--out=x"], {"SLURM_STEP_NUM_TASKS": "2"}, "srun has started 2 processes"),
    ],
)
def test_launchers_that_are_not_known_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
