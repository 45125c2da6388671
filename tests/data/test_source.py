"""Folders of images and of tar shards: items, classes, captions, and the split by names."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.data import load_image_folder
from fastvq.data.examples import describe
from fastvq.data.image_format import ImageFormat
from fastvq.data.image_io import IMAGES, read_image
from fastvq.data.source import CAPTIONS, Folder, Item, Shards, open_source
from fastvq.data.split import split_items
from fastvq.errors import ConfigError, DataError

SIZE = ImageFormat(8)


def png(number: int, size: tuple[int, int] = (10, 12)) -> bytes:
    """Return an image of noise that depends on its number alone."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def folder_of(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


class TestClasses:
    def test_subfolders_are_classes(self, tmp_path: Path) -> None:
        names = [f"{kind}/{sub}{n}.png" for kind in ("cat", "dog", "3") for n in range(6) for sub in ("", "more/")]
        images = load_image_folder(folder_of(tmp_path, names), image_size=8, test_fraction=0.3)
        assert images.class_names == ("3", "cat", "dog")
        assert images.train_labels is not None
        assert images.test_labels is not None
        assert [images.class_names[label] for label in images.test_labels] == [
            name.partition("/")[0] for name in images.test_names
        ]
        assert len(images.train_labels) == len(images.train)
        assert images.train_labels.unique().tolist() == [0, 1, 2]
        assert "3 classes" in describe(images)

    @pytest.mark.parametrize("names", [["a.png", "cat/b.png", "dog/c.png"], ["cat/b.png", "cat/c.png"]])
    def test_files_beside_subfolders_or_one_subfolder_are_no_classes(self, tmp_path: Path, names: list[str]) -> None:
        images = load_image_folder(folder_of(tmp_path, names), image_size=8)
        assert images.class_names is images.train_labels is images.test_labels is None

    def test_each_class_has_an_image_to_learn_from(self) -> None:
        items = [Item(f"{kind}/{n}.png", f"{kind}") for kind in range(40) for n in range(1 + kind % 3)]
        train, test = split_items(items, 0.5)
        assert {item.class_name for item in train} == {item.class_name for item in items}
        assert len(test) > 10
        assert sorted([*train, *test], key=items.index) == items
        assert train == sorted(train, key=items.index)

    def test_too_few_images_for_the_classes_are_named(self, tmp_path: Path) -> None:
        with pytest.warns(RuntimeWarning, match="1 class without an image to learn from:\n  (cat|dog)"):
            images = load_image_folder(folder_of(tmp_path, ["cat/a.png", "dog/b.png"]), image_size=8)
        assert images.class_names == ("cat", "dog")


class TestCaptions:
    def test_text_files_are_captions(self, tmp_path: Path) -> None:
        folder_of(tmp_path, [f"{n}.png" for n in range(10)])
        for n in range(9):
            (tmp_path / f"{n}.txt").write_text(f" picture {n} ä\n", encoding="utf-8")
        images = load_image_folder(tmp_path, image_size=8, test_fraction=0.5)
        assert images.train_captions is not None
        assert images.test_captions is not None
        assert images.test_captions == tuple(
            "" if name == "9.png" else f"picture {name[0]} ä" for name in images.test_names
        )
        assert sorted(images.train_captions + images.test_captions)[1:] == [f"picture {n} ä" for n in range(9)]
        assert "captions (1 of 10 have none)" in describe(images)

    def test_a_file_of_captions(self, tmp_path: Path) -> None:
        folder_of(tmp_path, ["a/b.png", "a/c.png"])
        lines = [{"file_name": "a/b.png", "text": "one"}, {"file_name": "a/gone.png", "text": "two"}]
        (tmp_path / CAPTIONS).write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        with pytest.warns(RuntimeWarning, match=r"1 caption of 2 left out, of images that are not there:\n  a/gone"):
            items = Folder(tmp_path, IMAGES).items()
        assert [item.caption for item in items] == ["one", None]

    @pytest.mark.parametrize("line", ["no json", "[]", '{"file_name": "a.png"}', '{"file_name": "a.png", "text": 3}'])
    def test_a_line_that_is_no_caption_is_named(self, tmp_path: Path, line: str) -> None:
        folder_of(tmp_path, ["a.png", "b.png"])
        (tmp_path / CAPTIONS).write_text('{"file_name": "b.png", "text": ""}\n' + line)
        with pytest.raises(DataError, match=r"captions\.jsonl, line 2: must be a caption"):
            load_image_folder(tmp_path, image_size=8)

    def test_a_changed_caption_is_seen(self, tmp_path: Path) -> None:
        folder_of(tmp_path, ["a.png", "b.png"])
        for text in ("short", "a longer one"):
            (tmp_path / "a.txt").write_text(text)
            images = load_image_folder(tmp_path, image_size=8)
            assert text in (images.train_captions or ()) + (images.test_captions or ())


class TestShards:
    def samples(self, first: int, count: int) -> dict[str, bytes]:
        files = {}
        for n in range(first, first + count):
            files |= {f"part/{n:03d}.png": png(n), f"part/{n:03d}.txt": f"caption {n}".encode()}
            files[f"part/{n:03d}.cls"] = str(n % 2).encode()
        return files

    @pytest.mark.parametrize("workers", [0, 2])
    def test_shards_are_a_data_set(self, tmp_path: Path, workers: int) -> None:
        shard(tmp_path / "b.tar", self.samples(10, 8))
        shard(tmp_path / "a.tar", self.samples(0, 10) | {"part/note.md": b"no sample with an image"})
        images = load_image_folder(tmp_path, image_size=8, test_fraction=0.4, workers=workers)
        assert images.class_names == ("0", "1")
        assert images.test_labels is not None
        assert images.test_captions is not None
        numbers = [int(name[-3:]) for name in images.test_names]
        assert numbers == sorted(numbers)
        assert [name[:5] for name in images.test_names] == ["a.tar" if n < 10 else "b.tar" for n in numbers]
        assert images.test_labels.tolist() == [n % 2 for n in numbers]
        assert images.test_captions == tuple(f"caption {n}" for n in numbers)
        for row, n in enumerate(numbers):
            assert torch.equal(images.test[row], read_image("x.png", SIZE, png(n)))
        assert len(images.train) + len(images.test) == 18

    def test_one_shard_and_its_objects(self, tmp_path: Path) -> None:
        described = json.dumps({"label": "cat", "text": "a cat"}).encode()
        shard(tmp_path / "one.tar", {"x.jpg.png": png(0), "x.json": described, "y.PNG": png(1), "y.json": b"["})
        items = Shards(tmp_path / "one.tar", IMAGES).items()
        assert items == [Item("one.tar/x", "cat", "a cat"), Item("one.tar/y")]

    def test_damaged_samples_and_shards_are_named(self, tmp_path: Path) -> None:
        shard(tmp_path / "a.tar", self.samples(0, 4) | {"part/zzz.png": b"no image"})
        with pytest.raises(DataError, match=r"a\.tar/part/zzz\.png is not a readable image: unknown format"):
            load_image_folder(tmp_path, image_size=8)
        (tmp_path / "a.tar").write_bytes(b"no archive, but long enough for a header" * 40)
        with pytest.raises(DataError, match=r"a shard cannot be read"):
            load_image_folder(tmp_path, image_size=8)
        shard(tmp_path / "a.tar", {"x.txt": b"only text"})
        with pytest.raises(DataError, match=r"holds no samples with images \(files that end in"):
            load_image_folder(tmp_path, image_size=8)

    def test_a_folder_with_images_beside_an_archive_is_a_folder(self, tmp_path: Path) -> None:
        folder_of(tmp_path, ["a.png"])
        shard(tmp_path / "backup.tar", self.samples(0, 2))
        assert isinstance(open_source(tmp_path, IMAGES), Folder)


class TestFormat:
    @pytest.mark.parametrize(("fit", "left"), [("crop", 200), ("pad", 0), ("stretch", 0)])
    def test_an_image_of_another_aspect(self, tmp_path: Path, fit: str, left: int) -> None:
        striped = np.zeros((8, 24), np.uint8)
        striped[:, 8:16] = 200
        Image.fromarray(striped).save(tmp_path / "a.png")
        pixels = read_image(tmp_path / "a.png", ImageFormat(8, 8, True, fit))[0].int()
        assert pixels.shape == (8, 8)
        assert abs(int(pixels[4, 0]) - left) < 30  # bicubic
        assert int(pixels[4, 4]) > 150
        assert (int(pixels[0].max()) == 0) == (fit == "pad")

    def test_width_is_not_height(self, tmp_path: Path) -> None:
        images = load_image_folder(folder_of(tmp_path, ["a.png", "b.png"]), image_size=8, image_width=12)
        assert images.train.shape == (1, 3, 8, 12)

    def test_an_unknown_fit_is_named(self) -> None:
        with pytest.raises(ConfigError, match="fit must be one of crop, pad, stretch, got 'zoom'"):
            ImageFormat(8, fit="zoom")

    def test_crops_are_of_larger_images(self, tmp_path: Path) -> None:
        folder_of(tmp_path, [f"{n}.png" for n in range(6)])
        images = load_image_folder(tmp_path, image_size=8, image_width=4, crop_from=12, test_fraction=0.4)
        assert images.uncropped is not None
        assert images.uncropped.shape[1:] == (3, 12, 6)
        assert torch.equal(images.train, images.uncropped[:, :, 2:10, 1:5])
        assert images.test.shape[1:] == (3, 8, 4)
        with pytest.raises(DataError, match="crop_from must be at least image_size = 8, got 6"):
            load_image_folder(tmp_path, image_size=8, crop_from=6)
