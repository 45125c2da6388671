"""Fashion-MNIST: a class-balanced subset in the package, and the whole set from Debian's package.

The held-out images of the subset are exact. Its training images keep 64 of the 256 gray levels: the rounding error lies
47 dB below the signal's peak, far below any reconstruction error, and makes room for 5,700 of them in 2 MB. To rebuild
the file, byte for byte, from Debian's package `dataset-fashion-mnist`:

    python -c "from fastvq.data import fashion_mnist; fashion_mnist.build_subset()"

Source: Xiao, Rasul, Vollgraf 2017, Fashion-MNIST (MIT license, see fashion_mnist.LICENSE).
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastvq.files import StrPath, write_whole

from .benchmark_files import read_idx
from .examples import Examples
from .registry import FULL, FULL_FOLDER, SUBSET

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SHIPPED = Path(__file__).with_name("fashion_mnist.npz.xz")
DEBIAN = FULL_FOLDER
TRAIN_PER_CLASS = 570
TEST_PER_CLASS = 100
_GRAY_STEP = 4

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 0}]
"""Settings for literals of 8-bit pixels: three bits of the previous pixel as context, no alignment to exploit."""

Array = npt.NDArray[np.uint8]


def _as_examples(name: str, train: Array, train_labels: Array, test: Array, test_labels: Array) -> Examples:
    return Examples(
        name=name,
        train=torch.from_numpy(train).unsqueeze(1),
        test=torch.from_numpy(test).unsqueeze(1),
        test_names=tuple(CLASSES[label] for label in test_labels),
        train_labels=torch.from_numpy(train_labels).long(),
        test_labels=torch.from_numpy(test_labels).long(),
        class_names=CLASSES,
    )


def load_fashion_mnist(path: StrPath = SHIPPED) -> Examples:
    """Return the subset that `build_subset` wrote to `path`.

    The shipped one has 5,700 training and 1,000 held-out images of 28x28, equally many of each of the ten classes.
    """
    with lzma.open(path) as file, np.load(io.BytesIO(file.read())) as arrays:
        train = arrays["train"] * np.uint8(_GRAY_STEP)
        return _as_examples(SUBSET, train, arrays["train_labels"], arrays["test"], arrays["test_labels"])


def load_full_fashion_mnist(root: StrPath = DEBIAN) -> Examples:
    """Return all 60,000 training and 10,000 test images.

    Args:
        root: the folder with the four IDX files.

    Raises:
        DataError: a file is missing; the message names the package that contains it.
    """
    return _as_examples(FULL, *_read_split(root, "train"), *_read_split(root, "t10k"))


def _read_split(root: StrPath, split: str) -> tuple[Array, Array]:
    files = [Path(root) / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    images, labels = (read_idx(path, missing="install Debian's package dataset-fashion-mnist") for path in files)
    return images, labels


def _first_of_each_class(images: Array, labels: Array, count: int) -> tuple[Array, Array]:
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(CLASSES))]))
    return images[chosen], labels[chosen]


def build_subset(
    root: StrPath = DEBIAN,
    path: StrPath = SHIPPED,
    *,
    train_per_class: int = TRAIN_PER_CLASS,
    test_per_class: int = TEST_PER_CLASS,
) -> None:
    """Write the subset file from the IDX files in `root`: the first images of each class, in the set's order."""
    train, train_labels = _first_of_each_class(*_read_split(root, "train"), train_per_class)
    test, test_labels = _first_of_each_class(*_read_split(root, "t10k"), test_per_class)
    # Rounding 254 and 255 up would wrap around to black.
    levels = np.minimum((train.astype(np.uint16) + _GRAY_STEP // 2) // _GRAY_STEP, 255 // _GRAY_STEP)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        train=levels.astype(np.uint8),
        train_labels=train_labels,
        test=test,
        test_labels=test_labels,
    )
    write_whole(path, lzma.compress(buffer.getvalue(), filters=LZMA_FILTERS))
