"""The cache of decoded images: what hits it, what damages it, and what a set that is larger than memory takes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvq.cli.main import main
from fastvq.data import decoded, image_io, load_image_folder
from fastvq.data.decoded import cache_folder
from fastvq.data.examples import digest_of
from fastvq.errors import DataError, SkippedFilesWarning

from .test_source import folder_of, png


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastvq" / "decoded"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the names of the files that are decoded."""
    names: list[str] = []
    original = image_io.read_image
    monkeypatch.setattr(image_io, "read_image", lambda path, *rest: names.append(path.name) or original(path, *rest))
    return names


def test_a_folder_is_decoded_once_wherever_it_lies(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(8)])
    first = load_image_folder(root, image_size=8)
    assert sorted(reads) == [f"{n}.png" for n in range(8)]
    reads.clear()
    os.rename(root, tmp_path / "moved")
    again = load_image_folder(tmp_path / "moved", image_size=8)
    assert not reads
    assert again.fingerprint() == first.fingerprint() == digest_of(first.train, first.test)
    assert torch.equal(again.train, first.train)
    assert again.test_names == first.test_names
    assert again.name == "moved"
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("setting", [{"image_size": 4}, {"grayscale": True}, {"fit": "pad"}, {"test_fraction": 0.4}])
def test_other_settings_are_another_entry(
    tmp_path: Path, cache: Path, reads: list[str], setting: dict[str, object]
) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(8)])
    load_image_folder(root, image_size=8)
    reads.clear()
    load_image_folder(root, **({"image_size": 8} | setting))  # type: ignore[arg-type]
    assert len(reads) == 8


def test_changed_and_new_files_are_seen(tmp_path: Path, cache: Path) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(8)])
    prints = [load_image_folder(root, image_size=8).fingerprint()]
    (root / "3.png").write_bytes(png(99))
    prints.append(load_image_folder(root, image_size=8).fingerprint())
    (root / "8.png").write_bytes(png(8))
    prints.append(load_image_folder(root, image_size=8).fingerprint())
    (root / "8.png").unlink()
    assert len(set(prints)) == 3
    assert load_image_folder(root, image_size=8).fingerprint() == prints[1]


@pytest.mark.parametrize("file", ["values.npy", "items.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path, reads: list[str], file: str, damage: str) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(4)])
    expected = load_image_folder(root, image_size=8).fingerprint()
    (entry,) = cache.iterdir()
    content = bytearray((entry / file).read_bytes())
    content[-20] ^= 1
    if damage == "delete":
        (entry / file).unlink()
    else:
        (entry / file).write_bytes(content if damage == "flip" else content[:-30])
    reads.clear()
    assert load_image_folder(root, image_size=8).fingerprint() == expected
    assert len(reads) == 4
    reads.clear()
    load_image_folder(root, image_size=8)
    assert not reads


def test_unreadable_files_are_known_to_the_cache(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(8)])
    expected = load_image_folder(root, image_size=8)
    for name in ("00.png", "zz.jpg"):
        (root / name).write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 10 files cannot be read"):
        load_image_folder(root, image_size=8)
    reads.clear()
    with pytest.warns(SkippedFilesWarning, match="skipped 2 files of 10"):
        images = load_image_folder(root, image_size=8, skip_unreadable=True)
    assert not reads
    assert torch.equal(images.train, expected.train)
    assert torch.equal(images.test, expected.test)
    assert images.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("at", ["write", "rename"])
def test_a_full_disk_is_survived(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(4)])
    expected = load_image_folder(root, image_size=8)
    shutil.rmtree(cache)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((decoded, "write_whole") if at == "write" else (os, "rename")), full)
        with pytest.warns(RuntimeWarning, match="No space left on device: decoded examples are held in memory"):
            images = load_image_folder(root, image_size=8)
    assert images.fingerprint() == expected.fingerprint()
    assert torch.equal(images.train, expected.train)
    assert not list(cache.iterdir())


def test_an_interrupted_decoding_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(4)])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_io, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_image_folder(root, image_size=8)
    assert not list(cache.iterdir())
    assert len(load_image_folder(root, image_size=8).train) == 3


def test_processes_decode_alike(tmp_path: Path, cache: Path) -> None:
    root = folder_of(tmp_path / "images", [f"{n}.png" for n in range(12)])
    (root / "bad.png").write_bytes(b"")
    alone = []
    for workers in (0, 2):
        with pytest.warns(SkippedFilesWarning):
            alone.append(load_image_folder(root, image_size=8, skip_unreadable=True, workers=workers).fingerprint())
        shutil.rmtree(cache)
    assert alone[0] == alone[1]


def test_the_command_lists_data_sets_and_clears_the_cache(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_image_folder(folder_of(tmp_path / "images", ["a.png", "b.png"]), image_size=8)
    assert main(["data"]) == 0
    printed = capsys.readouterr().out
    assert "fashion-mnist       images, 28x28 gray, 5700 + 1000 held out, MIT\n" in printed
    assert f"cache: {cache}: 1 data set, 0.0 MB" in printed
    assert main(["data", "--clear"]) == 0
    assert not list(cache.iterdir())
    assert cache_folder() == cache


_ANONYMOUS = """
import resource, sys
from fastvq.data import load_image_folder
from fastvq.modalities import ImageConfig
from fastvq.training import Trainer

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

images = load_image_folder(sys.argv[1], image_size=64, workers=0)
config = ImageConfig(
    data=sys.argv[1], image_size=64, grayscale=False, width=8, dim=8, codebook_size=8, batch_size=8, steps=12
)
trainer = Trainer(config, images, sys.argv[2])
before = anonymous()
for _ in range(10):
    trainer.train_step()
images.fingerprint()
pixels = (images.train.numel() + images.test.numel()) / 2**20
print(pixels, before, anonymous())
"""


@pytest.mark.machine
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_set_larger_than_memory_is_not_held(tmp_path: Path, cache: Path) -> None:
    """A set of 270 MB, made of links to one image, takes less than a tenth of that."""
    root = folder_of(tmp_path / "images", ["0.png"])
    for n in range(1, 22_000):
        os.link(root / "0.png", root / f"{n}.png")
    command = [sys.executable, "-c", _ANONYMOUS, str(root), str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    pixels, before, after = map(float, printed)
    empty = folder_of(tmp_path / "few", [f"{n}.png" for n in range(20)])
    command[3:] = [str(empty), str(tmp_path / "other")]
    _, few_before, few_after = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    assert pixels > 250
    assert before - few_before < 0.1 * pixels
    assert after - few_after < 0.1 * pixels
