"""Checkpoints that are whole or absent, and the metrics beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.errors import CheckpointError
from fastvq.modalities import ImageConfig
from fastvq.training import checkpoint
from fastvq.training.metrics import MetricsLog, read_metrics

SETTINGS = ImageConfig()


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


def test_folders_of_other_names_are_neither_read_nor_deleted(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, small_checkpoint(step))
    root = tmp_path / "checkpoints"
    names = ["step-00000004-best", "step-4", "step-000000004", "step-00000005.bak", "copy of step-00000006", ".hidden"]
    for name in names:
        shutil.copytree(root / "step-00000002", root / name)
    (root / "step-00000007").write_text("a file")
    (root / "step-00000008").symlink_to(root / "step-00000002")
    assert checkpoint.load_latest(tmp_path).step == 2
    checkpoint.save(tmp_path, small_checkpoint(123456789))
    assert [path.name for path in checkpoint.checkpoint_folders(tmp_path)] == ["step-00000002", "step-123456789"]
    kept = {"step-00000002", "step-123456789", "step-00000007", "step-00000008", *names}
    assert {path.name for path in root.iterdir()} == kept


def test_a_copy_under_the_name_of_another_step_is_named(tmp_path: Path) -> None:
    latest = checkpoint.save(tmp_path, small_checkpoint(2))
    shutil.copytree(latest, latest.with_name("step-00000003"))
    with pytest.raises(
        CheckpointError, match=r"step-00000003 is damaged \(checkpoint.json is of step 2\): delete it to"
    ):
        checkpoint.load_latest(tmp_path)


def test_a_step_is_saved_again_only_if_it_is_equal(tmp_path: Path) -> None:
    first = small_checkpoint(3)
    folder = checkpoint.save(tmp_path, first)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert checkpoint.save(tmp_path, dataclasses.replace(first, seconds=9.0)) == folder
    changed = [
        {"tensors": first.tensors | {"a.b": torch.arange(1, 6)}},
        {"tensors": first.tensors | {"a.b": torch.arange(5).int()}},
        {"tensors": {"a.b": first.tensors["a.b"]}},
        {"config": ImageConfig(seed=1)},
        {"data_fingerprint": "others"},
        {"built_from": {"kind": "lstm"}},
    ]
    for change in changed:
        with pytest.raises(CheckpointError, match="step-00000003 was written by another training"):
            checkpoint.save(tmp_path, dataclasses.replace(first, **change))
    with pytest.raises(CheckpointError, match="step-00000003 was written by another training: step 2 of this one"):
        checkpoint.save(tmp_path, small_checkpoint(2))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


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
    shutil.rmtree(latest)
    assert checkpoint.load_latest(tmp_path).step == 1


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    checkpoint.save(tmp_path, small_checkpoint(2))
    monkeypatch.setattr(Path, "read_bytes", lambda path: raise_(PermissionError(13, "Permission denied", str(path))))
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be read: .*Permission denied") as said:
        checkpoint.load_latest(tmp_path)
    assert "delete" not in str(said.value)


def raise_(error: Exception) -> None:
    raise error


def as_format_1(folder: Path, **changes: object) -> None:
    """Write a checkpoint.json as earlier versions did, without a digest of itself."""
    description = json.loads((folder / "checkpoint.json").read_text())
    description.pop("sha256", None)
    (folder / "checkpoint.json").write_text(json.dumps(description | {"format": 1} | changes, indent=2) + "\n")


def test_format_1_is_read(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, small_checkpoint(3))
    as_format_1(folder)
    assert checkpoint.load_latest(tmp_path).same_state(dataclasses.replace(small_checkpoint(3)))
    as_format_1(folder, format=2)
    with pytest.raises(CheckpointError, match=r"checkpoint.json does not match its SHA-256"):
        checkpoint.load_latest(tmp_path)


def test_flags_of_earlier_checkpoints_are_read() -> None:
    """They were bool before they were float32."""
    trained, fresh = (fastvq.VectorQuantize(4, 8, kmeans_init=True) for _ in range(2))
    trained(torch.randn(1, 32, 4))
    tensors = {f"model.{name}": value for name, value in trained.state_dict().items()}
    name = "model._codebook.initted"
    saved = dataclasses.replace(small_checkpoint(3), tensors=tensors | {name: tensors[name].bool()})
    saved.load_model(fresh)
    assert fresh._codebook.initted
    assert torch.equal(fresh.codebook, trained.codebook)
    with pytest.raises(ValueError, match=r"initted is torch.int64, expected torch.float32"):
        dataclasses.replace(saved, tensors=tensors | {name: tensors[name].long()}).load_model(fresh)


def test_a_checkpoint_of_another_version_is_not_called_damaged(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, small_checkpoint(1))
    as_format_1(folder, format=7)
    with pytest.raises(CheckpointError, match=r"step-00000001: format 7, this version reads 1 to 2$"):
        checkpoint.load_latest(tmp_path)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, small_checkpoint(3))
    draw = random.Random(0)
    for path in folder.iterdir():
        content = path.read_bytes()
        for position in range(len(content)):
            path.write_bytes(flipped(content, position, draw.randrange(8)))
            with pytest.raises(CheckpointError, match="step-00000003"):
                checkpoint.load_latest(tmp_path)
        path.write_bytes(content)
    checkpoint.load_latest(tmp_path)


def test_mutated_files_are_errors_or_as_they_were(tmp_path: Path) -> None:
    """Several changes at once, in format 1 too, which cannot find all of them but fails of none."""
    folder = checkpoint.save(tmp_path, small_checkpoint(3))
    path, draw = folder / "checkpoint.json", random.Random(1)
    for version in (2, 1):
        if version == 1:
            as_format_1(folder)
        content = path.read_bytes()
        for _ in range(250):
            changed = bytearray(content)
            for _ in range(draw.choice([1, 1, 2, 5])):
                at, kind = draw.randrange(len(changed)), draw.randrange(4)
                if kind == 0:
                    changed[at] = draw.randrange(256)
                elif kind == 1:
                    del changed[at : at + draw.randrange(1, 60)]
                elif kind == 2:
                    changed[at:at] = draw.choice([b"[", b"{", b"9" * 20, b'"', b"null", b"NaN", b"-1", b"\0", b"1e999"])
                else:
                    to = draw.randrange(len(changed))
                    changed[at : at + 9] = changed[to : to + 9]
            path.write_bytes(changed)
            try:
                loaded = checkpoint.load_latest(tmp_path)
            except CheckpointError as error:
                named = str(folder) in str(error)
            else:
                named = loaded.step == 3 and (version == 1 or bytes(changed) == content)
            assert named
        path.write_bytes(content)


def test_garbage_behind_a_right_digest_is_named(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, small_checkpoint(3))
    right = json.loads((folder / "checkpoint.json").read_text())
    del right["sha256"]
    config = right["config"]
    garbage: list[object] = [
        [], None, "text", 7, [right], {}, *({**right, name: value} for name, value in [
            ("step", "3"), ("step", 3.0), ("step", True), ("step", 4), ("step", -3), ("step", None), ("seconds", "1"),
            ("seconds", -1), ("seconds", float("nan")), ("seconds", float("inf")), ("seconds", []), ("format", "2"),
            ("format", None), ("format", 0), ("format", 2.0), ("config", []), ("config", None), ("config", [config]),
            ("config", "config"), ("config", config | {"steps": "12"}), ("config", config | {"steps": 12.5}),
            ("config", config | {"steps": None}), ("config", config | {"flip": 1}), ("config", config | {"data": 3}),
            ("config", config | {"learning_rate": []}), ("config", config | {"dim": True}), ("built_from", []),
            ("config", config | {"downsamples": 10**9}), ("config", config | {"decay": float("nan")}),
            ("config", config | {"1": 1}), ("data_fingerprint", 5), ("built_from", "x"), ("state_sha256", None),
            ("state_sha256", 64 * "0"),
        ]), *({key: value for key, value in right.items() if key != name} for name in
              ("format", "step", "seconds", "config", "data_fingerprint", "state_sha256")),
    ]  # fmt: skip
    for description in garbage:
        (folder / "checkpoint.json").write_bytes(sealed(description))
        with pytest.raises(CheckpointError, match="step-00000003"):
            checkpoint.load_latest(tmp_path)
    (folder / "checkpoint.json").write_bytes(sealed_text("[" * 100_000))
    with pytest.raises(CheckpointError, match="step-00000003 is damaged"):
        checkpoint.load_latest(tmp_path)
    (folder / "checkpoint.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="step-00000003 is damaged"):
        checkpoint.load_latest(tmp_path)
    draw = random.Random(2)
    state = (folder / "state.safetensors").read_bytes()
    for content in (b"", b"\0" * 8, draw.randbytes(99), b"\xff" * 99, state[:-1], state[:9], state[1:], state + b"\0"):
        (folder / "state.safetensors").write_bytes(content)
        (folder / "checkpoint.json").write_bytes(sealed(right | {"state_sha256": hashlib.sha256(content).hexdigest()}))
        with pytest.raises(CheckpointError, match="step-00000003 is damaged"):
            checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize("name", ["model.weight", "model.bias"])
def test_weights_with_a_nan_are_named(tmp_path: Path, name: str) -> None:
    model = torch.nn.Linear(3, 2)
    tensors = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    checkpoint.Checkpoint(3, 1.5, SETTINGS, "data", tensors).load_model(model)
    tensors[name].view(-1)[1] = float("nan")
    with pytest.raises(ValueError, match=f"^{name} has a NaN$"):
        checkpoint.Checkpoint(3, 1.5, SETTINGS, "data", tensors).load_model(model)


def sealed(description: object) -> bytes:
    return checkpoint.seal(description) if isinstance(description, dict) else sealed_text(json.dumps(description))


def sealed_text(text: str) -> bytes:
    rest = text.encode()
    return b'{\n  "sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


@pytest.mark.parametrize(
    "line",
    ["not json", "[]", "7", "null", "{}", '{"step": 3}', '{"step": "3", "split": "train"}', '{"step": 3, "split": 1}',
     '{"step": true, "split": "train"}', '{"step": 1, "split": "train"}', '{"step": 0, "split": "train"}',
     '{"step": 3, "split": "train", "loss": "low"}', '{"step": 3, "split": "train", "loss": [1]}', "\0" * 30,
     "[" * 100_000],
    ids=lambda line: line[:20],
)  # fmt: skip
def test_garbage_in_the_metrics_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    first, last = '{"step": 2, "split": "train", "loss": 0.5}\n', '{"step": 4, "split": "test"}\n'
    path.write_text(first + line + "\n" + last)
    for read in (read_metrics, lambda path: MetricsLog(path.parent, step=4)):
        with pytest.raises(CheckpointError, match=rf"{path} is damaged in line 2 \("):
            read(path)
    path.write_bytes(first.encode() + b"\xff\xfe\n")
    with pytest.raises(CheckpointError, match="is damaged in line 2"):
        read_metrics(path)
    path.write_text(first + last)
    assert [record["step"] for record in read_metrics(path)] == [2, 4]


def test_a_step_that_leaps_ahead_hides_no_records(tmp_path: Path) -> None:
    """A flipped bit turns step 2 into 66: the records after it are not those of a killed process."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "split": "train"}}\n' for step in (66, 4, 6)))
    with pytest.raises(CheckpointError, match=r"line 2 \(step 4 follows step 66\): delete the line"):
        MetricsLog(tmp_path, step=6)
    assert len(path.read_text().splitlines()) == 3


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
