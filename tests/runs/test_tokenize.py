"""A data set as arrays of indices: every example once, whatever interrupts it and however many processes write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvq
from fastvq.cli.main import main
from fastvq.data import IndexShards, image_io
from fastvq.data.image_io import IMAGES
from fastvq.errors import ConfigError, DataError, SkippedFilesWarning
from fastvq.runs import tokenize as room
from fastvq.runs.tokenize import tokenize

from ..tiny_runs import tiny_run

COUNT = 23


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run, images = tiny_run(tmp_path_factory.mktemp("tokenize"), count=COUNT, grayscale=True)
    classed = images.parent / "classed"
    for number, path in enumerate(sorted(images.glob("*.png"))):
        (classed / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, classed / f"class{number % 2}" / path.name)
    (classed / "class0" / "00.txt").write_text("a picture")
    return run, classed


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "indices"
    lines = tokenize(*tiny, out, shard_files=5)
    assert lines == [f"{COUNT} images as 4 x 4 indices each, in 5 shards", f"manifest: {out / 'manifest.json'}"]
    return out


def test_the_indices_are_those_of_the_model(tiny: tuple[Path, Path], whole: Path) -> None:
    run, data = tiny
    shards, model = IndexShards(whole), fastvq.load(run)
    assert len(shards) == COUNT
    paths = sorted(data.rglob("*.png"), key=lambda path: path.relative_to(data).as_posix())
    assert shards.names == [path.relative_to(data).as_posix() for path in paths]
    assert shards.class_names == [path.parent.name for path in paths]
    assert [caption for caption in shards.captions if caption] == ["a picture"]
    for row, path in enumerate(paths):
        pixels = IMAGES.read(path, model.config.example_format, None)
        assert torch.equal(shards[row], model.encode(pixels)[0])
    assert shards[-1].dtype == torch.int64
    assert np.load(whole / "shard-000000.npy").dtype == np.int16
    with pytest.raises(IndexError):
        shards[COUNT]
    batch = next(iter(torch.utils.data.DataLoader(shards, batch_size=4)))
    assert batch.shape == (4, 4, 4)


def test_an_interrupted_call_is_continued(
    tiny: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = image_io.read_image

    def interrupted(path, *rest):
        if len(read) == 12:
            raise KeyboardInterrupt
        read.append(path.name)
        return original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(image_io, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize(*tiny, tmp_path / "out", shard_files=5)
    with pytest.raises(DataError, match="is unfinished: the same fastvq tokenize continues"):
        IndexShards(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.npy").write_bytes(b"damaged")
    again: list[str] = []
    monkeypatch.setattr(image_io, "read_image", lambda path, *rest: again.append(path.name) or original(path, *rest))
    tokenize(*tiny, tmp_path / "out", shard_files=5)
    assert again == [Path(name).name for name in IndexShards(whole).names[5:]]  # all but the first shard
    assert content(tmp_path / "out") == content(whole)


def test_two_processes_write_the_same_files(tiny: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    run, data = tiny
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    arguments = ["fastvq", "tokenize", str(data), f"--run={run}", f"--out={tmp_path / 'out'}", "--shard-files=5"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([*launcher, *arguments], text=True, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("manifest: ") == 1
    assert content(tmp_path / "out") == content(whole)


def test_damage_is_named(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    array = folder / "shard-000003.npy"
    flipped = bytearray(array.read_bytes())
    flipped[-1] ^= 1
    array.write_bytes(flipped)
    with pytest.raises(DataError, match=r"shard-000003\.npy is damaged"):
        IndexShards(folder)
    assert len(IndexShards(folder, verify=False)) == COUNT
    with pytest.raises(DataError, match="holds no indices of fastvq tokenize"):
        IndexShards(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shard-000000.json", lambda text: text.replace("class0", "class1"), r"shard-000000\.json is damaged"),
        ("shard-000001.json", lambda text: "{", "copy is damaged"),
        ("shard-000001.json", None, "copy is damaged"),
        ("manifest.json", lambda text: text.replace('"shards"', '"shreds"'), "copy is damaged: 'shards'"),
        ("manifest.json", lambda text: text.replace("shard-000002.npy", "../x/shard-000002.npy"), "names '../x"),
    ],
)
def test_damaged_descriptions_are_named(whole, tmp_path, name, change, message) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(change((folder / name).read_text()))
    with pytest.raises(DataError, match=message):
        IndexShards(folder, verify=False)


def test_what_cannot_be_done_is_refused(tiny: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    run, data = tiny
    with pytest.raises(DataError, match=r"holds indices of other settings \(shard_files, shard_count\)"):
        tokenize(run, data, whole, shard_files=6)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").touch()
    with pytest.raises(DataError, match="used holds other files: choose another folder"):
        tokenize(run, data, tmp_path / "used")
    with pytest.raises(ConfigError, match=r"out: .* lies in"):
        tokenize(run, data, data / "out")
    with pytest.raises(ConfigError, match="shard_files must be at least 1, got 0"):
        tokenize(run, data, tmp_path / "x", shard_files=0)
    with pytest.raises(DataError, match=r"cifar10 doesn't exist: data must be 'fashion-mnist' \("):
        tokenize(run, "cifar10", tmp_path / "x")
    with pytest.raises(DataError, match="data: fashion-mnist has images, 28x28 gray; the run has images, 1 x 16 x 16"):
        tokenize(run, "fashion-mnist", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_unreadable_files_are_named_or_counted(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = tiny
    data = shutil.copytree(data, tmp_path / "data")
    (data / "class1" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png is not a readable image"):
        tokenize(run, data, tmp_path / "out", shard_files=30)
    (data / "class0" / "worse.png").write_bytes(b"none either")
    with pytest.raises(DataError, match=r"2 of 25 files cannot be read(.|\n)*worse\.png(.|\n)*bad\.png"):
        tokenize(run, data, tmp_path / "out", shard_files=1)
    with pytest.warns(SkippedFilesWarning):
        tokenize(run, data, tmp_path / "each", shard_files=1, skip_unreadable=True)
    assert len(IndexShards(tmp_path / "each")) == COUNT
    (data / "class0" / "worse.png").unlink()
    shutil.rmtree(tmp_path / "out")
    with pytest.warns(SkippedFilesWarning):
        lines = tokenize(run, data, tmp_path / "out", shard_files=30, skip_unreadable=True)
    assert lines[0] == f"{COUNT} images as 4 x 4 indices each, in 1 shard, 1 file skipped"
    assert list(IndexShards(tmp_path / "out").manifest["failures"]) == ["class1/bad.png"]


def test_a_data_set_with_a_name(tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvq.data import DATA_SETS, DataSet, Examples

    run, _ = tiny
    pixels = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    examples = Examples("noise", pixels[:4], pixels[4:], ("",) * 3, labels, labels[:3], ("a", "b"))
    known = DataSet(lambda: examples, "noise", "", "16x16 gray", {"image_size": 16, "grayscale": True})
    monkeypatch.setitem(DATA_SETS, "noise", known)
    assert main(["tokenize", "noise", f"--run={run}", f"--out={tmp_path / 'out'}", "--shard-files=3"]) == 0
    shards = IndexShards(tmp_path / "out")
    assert shards.names == [*(f"train/{n:06d}" for n in range(4)), *(f"test/{n:06d}" for n in range(3))]
    assert shards.class_names == ["a", "b", "a", "b", "a", "b", "a"]
    assert torch.equal(torch.stack([shards[n] for n in range(7)]), fastvq.load(run).encode(pixels))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["examples"] == 7
    assert room.SHARD_FILES == 1000
