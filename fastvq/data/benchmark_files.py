"""Benchmark sets in the files that their authors publish: IDX, as of MNIST, and the binary version of CIFAR."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastvq.errors import DataError
from fastvq.files import StrPath

from .examples import Examples
from .image_format import ImageFormat
from .registry import folder_name

Array = npt.NDArray[np.uint8]
_PIXELS = 3 * 32 * 32
_CIFAR = {
    # By the file to hold out: files to learn from, label bytes before the pixels, names of the classes.
    "test_batch.bin": ([f"data_batch_{n}.bin" for n in range(1, 6)], 1, "batches.meta.txt"),
    "test.bin": (["train.bin"], 2, "fine_label_names.txt"),
}


def load_benchmark_files(root: StrPath, format: ImageFormat) -> Examples | None:
    """Return the set in a folder with IDX files or with CIFAR-10 or CIFAR-100 in binary, or None if there is none.

    Its own test images are held out.

    Raises:
        DataError: a file is missing or damaged, or the images have another size or color than the format.
    """
    folder = Path(root)
    found = None
    if any((folder / f"train-images-idx3-ubyte{ending}").is_file() for ending in ("", ".gz")):
        found = _as_examples(folder, *_idx_split(folder, "train"), *_idx_split(folder, "t10k"), ())
    for held_out, (learned, labels, names) in _CIFAR.items():
        if (folder / held_out).is_file():
            train = [_cifar_batch(folder / name, labels) for name in learned]
            test, test_labels = _cifar_batch(folder / held_out, labels)
            images, train_labels = (np.concatenate(part) for part in zip(*train, strict=True))
            classes = (folder / names).read_text().split() if (folder / names).is_file() else ()
            found = _as_examples(folder, images, train_labels, test, test_labels, tuple(classes))
    if found is None:
        if (folder / "data_batch_1").is_file():
            raise DataError(f"{root} is CIFAR in Python's pickles, which can run any code: take its binary version")
        return None
    if tuple(found.train.shape[1:]) != format.shape:
        channels, height, width = found.train.shape[1:]
        color = "--grayscale" if channels == 1 else "--no-grayscale"
        raise DataError(f"{root} has images of {height}x{width}: give --image-size {height} {color}, and no width")
    return found


def read_idx(path: StrPath, *, missing: str) -> Array:
    """Read unsigned bytes in IDX format: two zero bytes, type 8, the number of axes, then each big-endian size.

    Args:
        path: the file, compressed by gzip if its name ends in .gz.
        missing: what to do if there is no such file.

    Raises:
        DataError: there is no such file, or it is none of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is missing: {missing}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = content[3]
        if content[:3] != b"\0\0\x08":
            raise ValueError("another type")
        shape = np.frombuffer(content, ">u4", axes, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{path} is not an IDX file of unsigned bytes") from error


def _idx_split(folder: Path, split: str) -> tuple[Array, Array]:
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{split}-{kind}"
        path = plain if plain.is_file() else plain.with_name(f"{plain.name}.gz")
        arrays.append(read_idx(path, missing="an IDX set has train and t10k, each with images and labels"))
    if arrays[0].ndim != 3 or arrays[1].ndim != 1 or len(arrays[0]) != len(arrays[1]):
        raise DataError(f"{folder}: the images and labels of {split} have shapes {arrays[0].shape}, {arrays[1].shape}")
    return arrays[0][:, None], arrays[1]


def _cifar_batch(path: Path, labels: int) -> tuple[Array, Array]:
    """Return the images (N, 3, 32, 32) of a file and their labels (N,), the last of the bytes before the pixels."""
    if not path.is_file():
        raise DataError(f"{path} is missing: the binary version of CIFAR has it")
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (labels + _PIXELS):
        raise DataError(f"{path} is not a file of CIFAR: {len(content)} bytes are no multiple of {labels + _PIXELS}")
    rows = content.reshape(-1, labels + _PIXELS)
    return rows[:, labels:].reshape(-1, 3, 32, 32).copy(), rows[:, labels - 1].copy()


def _as_examples(
    folder: Path, train: Array, train_labels: Array, test: Array, test_labels: Array, classes: tuple[str, ...]
) -> Examples:
    count = int(max(train_labels.max(), test_labels.max())) + 1
    names = classes or tuple(map(str, range(count)))
    if count > len(names):
        raise DataError(f"{folder} has labels up to {count - 1}, but names of {len(names)} classes")
    return Examples(
        name=folder_name(folder),
        train=torch.from_numpy(train),
        test=torch.from_numpy(test),
        test_names=tuple(names[label] for label in test_labels),
        train_labels=torch.from_numpy(train_labels).long(),
        test_labels=torch.from_numpy(test_labels).long(),
        class_names=names,
    )
