"""Benchmark sets in their authors' files: images, labels and names as written, and damage that is named."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from fastvq.data import load_image_folder
from fastvq.data.examples import describe
from fastvq.errors import DataError
from fastvq.modalities import ImageConfig
from fastvq.training import load_examples

random = np.random.default_rng(0)


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes()


def write_idx(folder, *, zipped):
    written = {}
    for split, count in (("train", 12), ("t10k", 5)):
        images = random.integers(0, 256, (count, 8, 8), np.uint8)
        labels = random.integers(0, 3, count, np.uint8)
        labels[-1] = 3
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{split}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
        written[split] = images, labels
    return written


def write_cifar(folder, *, names, labels=1):
    written = []
    for name in names:
        rows = random.integers(0, 256, (4, labels + 3072), np.uint8)
        rows[:, :labels] = random.integers(0, 3, (4, labels), np.uint8)
        (folder / name).write_bytes(rows.tobytes())
        written.append(rows)
    return written


CIFAR_10 = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path, zipped):
    written = write_idx(tmp_path, zipped=zipped)
    found = load_image_folder(tmp_path, image_size=8, grayscale=True)
    for own, labels, split in (
        (found.train, found.train_labels, "train"),
        (found.test, found.test_labels, "t10k"),
    ):
        assert torch.equal(own[:, 0], torch.from_numpy(written[split][0]))
        assert labels.tolist() == written[split][1].tolist()
    assert found.class_names == ("0", "1", "2", "3")
    assert found.name == tmp_path.name


def test_cifar_10(tmp_path):
    data = tmp_path / "cifar"
    data.mkdir()
    written = write_cifar(data, names=CIFAR_10)
    (data / "batches.meta.txt").write_text("airplane\nbird\ncat\n\n")
    settings = ImageConfig.of_folders | ImageConfig.presets["sonnet"]
    found = load_examples(ImageConfig(**settings | {"data": str(data), "image_size": 32}))
    assert describe(found) == "cifar: 20 training images, 4 held out, 3 classes"
    assert torch.equal(found.train[4:8].flatten(1), torch.from_numpy(written[1][:, 1:]))
    assert found.test_names == tuple(("airplane", "bird", "cat")[row[0]] for row in written[-1])
    with pytest.raises(DataError, match="cifar has images of 32x32: give --image-size 32 --no-grayscale"):
        load_examples(ImageConfig(**settings | {"data": str(data)}))


def test_cifar_100_has_fine_labels(tmp_path):
    train, test = write_cifar(tmp_path, names=["train.bin", "test.bin"], labels=2)
    found = load_image_folder(tmp_path, image_size=32)
    assert found.train_labels.tolist() == train[:, 1].tolist()
    assert torch.equal(found.test.flatten(1), torch.from_numpy(test[:, 2:]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "t10k-labels-idx1-ubyte").unlink(),
            "t10k-labels-idx1-ubyte.gz is missing: an IDX set has train",
        ),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x09\x03"), "is not an IDX file of unsigned bytes"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b""), "is not an IDX file of unsigned bytes"),
        (
            lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8))),
            r"the images and labels of t10k have shapes \(5, 8, 8\), \(4,\)",
        ),
        (lambda f: (f / "test_batch.bin").write_bytes(b"123"), "data_batch_1.bin is missing: the binary version of"),
    ],
)
def test_damage_is_named(tmp_path, spoil, message):
    write_idx(tmp_path, zipped=False)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_image_folder(tmp_path, image_size=8, grayscale=True)


def test_a_damaged_archive_is_named(tmp_path):
    write_idx(tmp_path, zipped=True)
    archive = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(archive.read_bytes())
    content[12:20] = b"\xff" * 8
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        load_image_folder(tmp_path, image_size=8, grayscale=True)


def test_labels_without_a_name_are_named(tmp_path):
    write_cifar(tmp_path, names=CIFAR_10)
    (tmp_path / "batches.meta.txt").write_text("airplane\n")
    with pytest.raises(DataError, match=r"has labels up to \d, but names of 1 classes"):
        load_image_folder(tmp_path, image_size=32)


def test_damaged_cifar_and_pickles(tmp_path):
    write_cifar(tmp_path, names=CIFAR_10)
    (tmp_path / "data_batch_2.bin").write_bytes(bytes(100))
    with pytest.raises(DataError, match="100 bytes are no multiple of 3073"):
        load_image_folder(tmp_path, image_size=32)
    pickled = tmp_path / "cifar-10-batches-py"
    pickled.mkdir()
    (pickled / "data_batch_1").write_bytes(b"")
    with pytest.raises(DataError, match="pickles, which can run any code: take its binary version"):
        load_image_folder(pickled, image_size=32)
