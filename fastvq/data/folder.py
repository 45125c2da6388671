"""Any folder of images as a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.errors import DataError
from fastvq.extras import require

from .images import Images

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def load_folder(root: Path, *, image_size: int, grayscale: bool = False, test_fraction: float = 0.1) -> Images:
    """Return every image under `root`, cropped to the central square and resized.

    A file is held out if the hash of its path inside the folder falls below `test_fraction`: the split is the same on
    every machine, and adding files does not move others to the other side. A file is on one side only.

    Args:
        root: searched recursively for files that end in one of `SUFFIXES`.
        image_size: side of the square images, in pixels.
        grayscale: one channel instead of three.
        test_fraction: share of the files to hold out, between 0 and 1.

    Raises:
        DataError: no such folder, fewer than two images in it, or a file that is not a readable image.
        MissingExtraError: Pillow is not installed.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder" if root.exists() else f"{root} doesn't exist")
    paths = sorted(
        (path for path in root.rglob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file()),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    if not paths:
        raise DataError(f"{root} holds no images (files that end in {', '.join(sorted(SUFFIXES))})")
    if len(paths) == 1:
        raise DataError(f"{root} holds one image: at least two are needed, one to learn from and one to hold out")
    train, test = split_by_file([path.relative_to(root).as_posix() for path in paths], test_fraction)
    images = {name: read_image(root / name, image_size=image_size, grayscale=grayscale) for name in train + test}
    return Images(
        name=root.name,
        train=torch.stack([images[name] for name in train]),
        test=torch.stack([images[name] for name in test]),
        test_names=tuple(test),
    )


def split_by_file(names: list[str], test_fraction: float) -> tuple[list[str], list[str]]:
    """Return the names to train on and the names to hold out, in the given order; neither side is empty.

    Raises:
        DataError: `test_fraction` is not between 0 and 1, or there are fewer than two names.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if len(names) < 2:
        raise DataError(f"a split needs at least two files, got {len(names)}")
    position = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names}
    # A small folder may fall on one side entirely: then the file nearest to the threshold changes sides.
    lowest, highest = min(names, key=position.__getitem__), max(names, key=position.__getitem__)
    test = [name for name in names if name != highest and (name == lowest or position[name] < test_fraction)]
    return [name for name in names if name not in set(test)], test


def read_image(path: Path, *, image_size: int, grayscale: bool) -> Tensor:
    """Return an image file as uint8 (C, image_size, image_size): the largest centered square, resized.

    16-bit gray is scaled to 8 bits; transparent pixels become white.

    Raises:
        DataError: the file is not a readable image; the message names it.
    """
    pillow = require("PIL.Image")
    ops = require("PIL.ImageOps")
    try:
        with pillow.open(path) as file:
            # Cameras store the sensor's orientation beside the pixels.
            upright = _eight_bit(ops.exif_transpose(file)).convert("L" if grayscale else "RGB")
            square = ops.fit(upright, (image_size, image_size), method=pillow.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image: {error}") from error
    pixels = np.atleast_3d(np.array(square, dtype=np.uint8))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def write_images(root: Path, images: Tensor, first: int, subfolders: Sequence[str] | None = None) -> None:
    """Write images (N, C, H, W), float in [0, 1], with one or three channels, as PNG files numbered from `first`.

    Args:
        root: an existing folder.
        subfolders: for each image, the folder in `root` that it is written to.
    """
    pillow = require("PIL.Image")
    for row, pixels in enumerate((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()):
        folder = root / subfolders[row] if subfolders else root
        folder.mkdir(exist_ok=True)
        pillow.fromarray(pixels).save(folder / f"{first + row:06d}.png")


def _eight_bit(image: Any) -> Any:
    """Return the image in a mode that Pillow converts to gray or color without clipping.

    Raises:
        ValueError: the range of its pixels is unknown.
    """
    pillow = require("PIL.Image")
    if image.mode.startswith("I;16"):
        return pillow.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range: convert it to 8 or 16 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    return image
