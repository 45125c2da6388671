"""The shipped images, the rebuild of their file, and folders of images."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvq.data import fashion_mnist, load_fashion_mnist, load_full_fashion_mnist, load_image_folder
from fastvq.data.examples import to_float
from fastvq.data.image_format import ImageFormat
from fastvq.data.image_io import read_image, write_image
from fastvq.data.split import split_by_file
from fastvq.errors import DataError, SkippedFilesWarning


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_root(tmp_path: Path) -> Path:
    """Write a data set in the form of the Debian package: 60 training and 40 test images, with classes in turn."""
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("t10k", 40)):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", (np.arange(count) * 7 % 10).astype(np.uint8))
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write thirty small color images in two subfolders, and a file of another kind."""
    random = np.random.default_rng(1)
    for n in range(30):
        path = tmp_path / "images" / f"part{n % 2}" / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_the_shipped_subset_is_small_and_balanced() -> None:
    assert fashion_mnist.SHIPPED.stat().st_size < 2_000_000
    images = load_fashion_mnist()
    assert images.train.shape == (5700, 1, 28, 28)
    assert images.test.shape == (1000, 1, 28, 28)
    assert images.train.dtype == images.test.dtype == torch.uint8
    assert images.train_labels is not None
    assert images.test_labels is not None
    assert images.train_labels.bincount().tolist() == [570] * 10
    assert images.test_labels.bincount().tolist() == [100] * 10
    assert len(images.test_names) == 1000


def test_no_held_out_image_is_also_trained_on() -> None:
    images = load_fashion_mnist()
    coarse = {image.numpy().tobytes() for image in images.train // 4}
    assert not any(image.numpy().tobytes() in coarse for image in ((images.test.int() + 2) // 4).clamp(max=63).byte())


def test_the_license_of_the_images_ships_beside_them() -> None:
    notice = fashion_mnist.SHIPPED.with_name("fashion_mnist.LICENSE").read_text()
    assert "Zalando" in notice
    assert "Permission is hereby granted" in notice


def test_rebuilding_is_deterministic_and_keeps_the_first_of_each_class(idx_root: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.xz", tmp_path / "b.xz"]
    for path in paths:
        fashion_mnist.build_subset(idx_root, path, train_per_class=3, test_per_class=2)
    assert paths[0].read_bytes() == paths[1].read_bytes()

    full, subset = load_full_fashion_mnist(idx_root), fashion_mnist.load_fashion_mnist(paths[0])
    assert torch.equal(subset.test, full.test[:20])
    assert subset.test_labels is not None
    assert subset.test_labels.bincount().tolist() == [2] * 10
    assert subset.train.shape == (30, 1, 28, 28)
    # Rounded to a multiple of 4, but never past 252: 255 would wrap around to black.
    assert (subset.train.int() - full.train[:30].int()).abs().max() <= 3
    assert torch.equal(subset.train % 4, torch.zeros_like(subset.train))


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist isn't installed")
def test_the_shipped_images_are_those_of_the_debian_package() -> None:
    full, subset = load_full_fashion_mnist(), load_fashion_mnist()
    assert full.train.shape == (60000, 1, 28, 28)
    assert full.test_labels is not None
    rows = torch.cat([(full.test_labels == c).nonzero()[:100, 0] for c in range(10)]).sort().values
    assert torch.equal(subset.test, full.test[rows])


def test_a_missing_or_foreign_idx_file_is_named(idx_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        load_full_fashion_mnist(tmp_path / "nowhere")
    labels = idx_root / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz is not an IDX file"):
        load_full_fashion_mnist(idx_root)


def test_a_fingerprint_tells_data_sets_apart() -> None:
    images = load_fashion_mnist()
    other = load_fashion_mnist()
    assert images.fingerprint() == other.fingerprint()
    other.train[17, 0, 3, 5] += 1
    assert images.fingerprint() != other.fingerprint()


def test_floats_span_zero_to_one() -> None:
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize(("grayscale", "channels"), [(True, 1), (False, 3)])
def test_a_folder_becomes_square_images_split_by_file(folder: Path, grayscale: bool, channels: int) -> None:
    images = load_image_folder(folder, image_size=16, grayscale=grayscale, test_fraction=0.3)
    assert images.train.shape[1:] == images.test.shape[1:] == (channels, 16, 16)
    assert len(images.train) + len(images.test) == 30
    assert len(images.test_names) == len(images.test)
    again = load_image_folder(folder, image_size=16, grayscale=grayscale, test_fraction=0.3)
    assert images.fingerprint() == again.fingerprint()
    assert images.test_names == again.test_names


def test_an_image_is_cropped_to_its_central_square(tmp_path: Path) -> None:
    striped = np.zeros((8, 24), np.uint8)
    striped[:, 8:16] = 200
    for name in ("a.png", "b.PNG"):
        Image.fromarray(striped).save(tmp_path / name, format="png")
    images = load_image_folder(tmp_path, image_size=8, grayscale=True)
    assert images.train.float().mean() == 200


@given(st.sets(st.text("abc/", min_size=1, max_size=8), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_a_split_is_complete_disjoint_and_never_empty(names: set[str], fraction: float) -> None:
    train, test = split_by_file(sorted(names), fraction)
    assert train
    assert test
    assert sorted(train + test) == sorted(names)


def test_new_files_move_no_others_to_the_other_side() -> None:
    names = [f"{n}.png" for n in range(200)]
    _, few = split_by_file(names[:150], 0.2)
    _, more = split_by_file(names, 0.2)
    assert set(few) == set(more) & set(names[:150])
    assert 20 < len(more) < 60


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_a_split_of_nothing_or_everything_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="test_fraction"):
        split_by_file(["a", "b"], fraction)


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="doesn't exist"):
        load_image_folder(tmp_path / "missing", image_size=8)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="is not a folder"):
        load_image_folder(file, image_size=8)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_image_folder(empty, image_size=8)
    Image.new("L", (8, 8)).save(empty / "one.png")
    with pytest.raises(DataError, match="holds one image"):
        load_image_folder(empty, image_size=8)
    (empty / "two.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"two\.png is not a readable image"):
        load_image_folder(empty, image_size=8)


def test_a_file_cut_short_is_named(folder: Path) -> None:
    path = folder / "part0" / "00.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"00\.png is not a readable image"):
        load_image_folder(folder, image_size=8)


def test_sixteen_bit_and_transparent_images_keep_their_look(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = read_image(tmp_path / "deep.png", ImageFormat(64, grayscale=True))[0, 0]
    assert torch.equal(pixels, (torch.from_numpy(ramp[0].astype(np.float64)) / 257).round().to(torch.uint8))
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert int(read_image(tmp_path / "clear.png", ImageFormat(8, grayscale=False)).min()) == 255
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff.*mode 'F'"):
        read_image(tmp_path / "float.tiff", ImageFormat(8, grayscale=True))


def test_hidden_files_and_folders_are_ignored(folder: Path) -> None:
    (folder / "._hidden.png").write_bytes(b"not an image")
    for hidden in (".thumbnails", "below/.fastvq-0123456789abcdef.tmp/deeper"):
        (folder / hidden).mkdir(parents=True)
        (folder / hidden / "000000.png").write_bytes(b"not an image")
    assert len(load_image_folder(folder, image_size=8, grayscale=True, test_fraction=0.5).train) > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_written_as_they_are_read(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(0, 256, (3, channels, 8, 8), dtype=torch.uint8)
    for number, image in enumerate(to_float(pixels)):
        write_image(tmp_path / f"{number}.png", image, "png")
    again = [read_image(tmp_path / f"{n}.png", ImageFormat(8, grayscale=channels == 1)) for n in range(3)]
    assert torch.equal(torch.stack(again), pixels)


def test_all_unreadable_files_are_named_at_once(folder: Path) -> None:
    (folder / "part0" / "00.png").write_bytes(b"")
    (folder / "part0" / "text.jpg").write_text("text")
    with pytest.raises(DataError, match=r"2 of 31 files cannot be read") as caught:
        load_image_folder(folder, image_size=8)
    assert [line.rpartition(": ")[2] for line in str(caught.value).splitlines()[1:]] == [
        "the file is empty",
        "unknown format",
    ]


def test_skipped_files_are_as_if_they_were_not_there(folder: Path, tmp_path: Path) -> None:
    expected = load_image_folder(folder, image_size=8)
    (folder / "part0" / "0.png").write_bytes(b"")
    (folder / "zz.jpg").write_text("text")
    with pytest.warns(
        SkippedFilesWarning, match=r"skipped 2 files of 32:\n  .*0\.png is not a readable image: .*\n  .*zz"
    ):
        images = load_image_folder(folder, image_size=8, skip_unreadable=True)
    assert images.fingerprint() == expected.fingerprint()
    assert images.test_names == expected.test_names


def test_many_unreadable_files_are_counted(tmp_path: Path) -> None:
    for n in range(50):
        (tmp_path / f"{n:02d}.png").write_bytes(b"")
    with pytest.raises(DataError, match="50 of 50 files") as caught:
        load_image_folder(tmp_path, image_size=8)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 30 more"


def test_one_readable_image_is_too_few(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / "two.png").write_bytes(b"")
    with pytest.warns(SkippedFilesWarning), pytest.raises(DataError, match="holds one readable image"):
        load_image_folder(tmp_path, image_size=8, skip_unreadable=True)


def test_large_images_are_read_and_too_large_ones_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    Image.new("L", (15, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(tmp_path / "large.png", ImageFormat(8, grayscale=True)).shape == (1, 8, 8)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"large\.png is not a readable image: it has more than 100 pixels, scale it"):
        read_image(tmp_path / "large.png", ImageFormat(8, grayscale=True))
