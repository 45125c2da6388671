"""Checkpoints that are whole or absent, and the metrics beside them."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from fastvq.errors import CheckpointError
from fastvq.training import TrainConfig, checkpoint
from fastvq.training.metrics import MetricsLog, read_metrics

SETTINGS = TrainConfig()


def small_checkpoint(step: int) -> checkpoint.Checkpoint:
    return checkpoint.Checkpoint(step, 1.5, SETTINGS, "data", {"a.b": torch.arange(5), "a.c": torch.ones(2, 3).T})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small_checkpoint(3))
    loaded = checkpoint.load_latest(tmp_path)
    assert (loaded.step, loaded.seconds, loaded.config, loaded.data_fingerprint) == (3, 1.5, SETTINGS, "data")
    assert torch.equal(loaded.part("a")["b"], torch.arange(5))
    assert torch.equal(loaded.part("a")["c"], torch.ones(3, 2))


def test_only_the_latest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 100):
        checkpoint.save(tmp_path, small_checkpoint(step))
    assert [path.name for path in checkpoint.checkpoint_folders(tmp_path)] == ["step-00000030", "step-00000100"]
    assert checkpoint.load_latest(tmp_path).step == 100


@pytest.mark.parametrize("crash_in", ["_write_to_disk", "_flush_folder", "rename", "discard"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_crash_while_saving_never_leaves_half_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_in: str, call: int
) -> None:
    class Crash(BaseException):
        pass

    for step in (1, 2):
        checkpoint.save(tmp_path, small_checkpoint(step))
    owner, name = (Path, "rename") if crash_in == "rename" else (checkpoint, crash_in)
    original = getattr(owner, name)
    calls = 0

    def crash_at_call(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Crash
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash_at_call)
        if (crash_in, call) == ("discard", 2):
            checkpoint.save(tmp_path, small_checkpoint(3))
        else:
            with pytest.raises(Crash):
                checkpoint.save(tmp_path, small_checkpoint(3))
    survivor = checkpoint.load_latest(tmp_path)
    renamed = crash_in == "discard" or (crash_in, call) in (("_flush_folder", 2), ("rename", 2))
    assert survivor.step == (3 if renamed else 2)
    for folder in checkpoint.checkpoint_folders(tmp_path):
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "state.safetensors"]
    # The next save clears what the crash left behind.
    checkpoint.save(tmp_path, small_checkpoint(4))
    assert checkpoint.load_latest(tmp_path).step == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "flip", "no state", "no json"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, small_checkpoint(1))
    latest = checkpoint.save(tmp_path, small_checkpoint(2))
    state, description = latest / "state.safetensors", latest / "checkpoint.json"
    content = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(content[:-9])
    elif damage == "flip":
        content[-1] ^= 1
        state.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    else:
        description.write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged .* delete it to continue from step-00000001"):
        checkpoint.load_latest(tmp_path)
    checkpoint.discard(latest)
    assert checkpoint.load_latest(tmp_path).step == 1


def test_a_checkpoint_of_another_version_is_not_called_damaged(tmp_path: Path) -> None:
    description = checkpoint.save(tmp_path, small_checkpoint(1)) / "checkpoint.json"
    description.write_text(description.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(CheckpointError, match=r"step-00000001: format 7, this version reads 1$"):
        checkpoint.load_latest(tmp_path)


def test_metrics_reach_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[object, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed",))

    tensorboard = types.ModuleType("tensorboard")
    tensorboard.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorboard", tensorboard)
    writers = types.ModuleType("torch.utils.tensorboard")
    writers.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writers)
    with MetricsLog(tmp_path, step=4) as log:
        log.write(6, "train", loss=0.5, perplexity=None)
    assert written == [(str(tmp_path / "tensorboard"), 5), ("train/loss", 0.5, 6), ("closed",)]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 6, "split": "train", "loss": 0.5, "perplexity": None}]
