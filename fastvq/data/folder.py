"""Any folder of images as a data set."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastvq.errors import DataError, SkippedFilesWarning, counted, first_line, listed
from fastvq.extras import require
from fastvq.files import StrPath

from .images import Images
from .registry import folder_name

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the files that are images."""
WRITTEN = SUFFIXES - {".gif"}
"""Endings of the images that `write_image` writes."""


def load_folder(
    root: StrPath,
    *,
    image_size: int,
    grayscale: bool = False,
    test_fraction: float = 0.1,
    skip_unreadable: bool = False,
) -> Images:
    """Return every image under `root`, cropped to the central square and resized.

    A file is held out if the hash of its path inside the folder falls below `test_fraction`: the split is the same on
    every machine, and adding files does not move others to the other side. A file is on one side only.

    Args:
        root: searched recursively for files that end in one of `SUFFIXES`.
        image_size: side of the square images, in pixels.
        grayscale: one channel instead of three.
        test_fraction: share of the files to hold out, between 0 and 1.
        skip_unreadable: leave out files that cannot be read, with a `SkippedFilesWarning`.

    Raises:
        DataError: no such folder, fewer than two images in it, or files that are not readable images: all are named.
        MissingExtraError: Pillow is not installed.
    """
    root = Path(root)
    paths = image_files(root)
    pixels = _readable(paths, image_size=image_size, grayscale=grayscale, skip_unreadable=skip_unreadable)
    names = {path.relative_to(root).as_posix(): image for path, image in pixels.items()}
    if len(names) < 2:
        found = "one readable image" if len(paths) > 1 else "one image"
        raise DataError(f"{root} holds {found}: at least two are needed, one to learn from and one to hold out")
    train, test = split_by_file(list(names), test_fraction)
    return Images(
        name=folder_name(root),
        train=torch.stack([names[name] for name in train]),
        test=torch.stack([names[name] for name in test]),
        test_names=tuple(test),
    )


def image_files(root: StrPath) -> list[Path]:
    """Return the images in a folder and its subfolders, in the order of their paths.

    Hidden files are left out, and all files in hidden folders, which hold thumbnails or files that are being written.

    Raises:
        DataError: no such folder, or none with images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder" if root.exists() else f"{root} doesn't exist")
    paths = sorted(
        (path for path in root.rglob("[!.]*") if _is_image(path.relative_to(root)) and path.is_file()),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    if not paths:
        raise DataError(f"{root} holds no images (files that end in {', '.join(sorted(SUFFIXES))})")
    return paths


def _is_image(path: Path) -> bool:
    """Return whether a path inside a folder of images is that of an image: by its ending, and not hidden."""
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def read_images(
    sources: Iterable[StrPath], *, image_size: int, grayscale: bool, skip_unreadable: bool = False
) -> tuple[Tensor, list[str]]:
    """Return image files, and all images in folders, as uint8 (N, C, image_size, image_size), and their paths.

    Args:
        sources: files, whatever their endings, and folders.
        image_size, grayscale, skip_unreadable: as for `load_folder`.

    Raises:
        DataError: a source doesn't exist, a folder holds no images, or no file or not all files can be read.
    """
    files: dict[Path, None] = {}
    missing = []
    for source in map(Path, sources):
        if not source.exists():
            missing.append(str(source))
        else:
            files |= dict.fromkeys(image_files(source) if source.is_dir() else [source])
    if missing:
        raise DataError(f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist")
    pixels = _readable(files, image_size=image_size, grayscale=grayscale, skip_unreadable=skip_unreadable)
    return torch.stack(list(pixels.values())), [str(path) for path in pixels]


def _readable(paths: Iterable[Path], *, image_size: int, grayscale: bool, skip_unreadable: bool) -> dict[Path, Tensor]:
    """Return the pixels of each file; raise or warn once for all files that cannot be read."""
    pixels: dict[Path, Tensor] = {}
    failed = []
    for path in paths:
        try:
            pixels[path] = read_image(path, image_size=image_size, grayscale=grayscale)
        except DataError as error:
            failed.append(str(error))
    if not failed:
        return pixels
    if len(failed) == 1 and not skip_unreadable:
        raise DataError(f"{failed[0]} (skip_unreadable leaves such files out)")
    if not skip_unreadable:
        raise DataError(
            f"{len(failed)} of {len(failed) + len(pixels)} files cannot be read as images"
            f" (skip_unreadable leaves them out):{listed(failed)}"
        )
    if not pixels:
        raise DataError(f"none of {counted(len(failed), 'file')} can be read as an image:{listed(failed)}")
    warnings.warn(
        f"skipped {counted(len(failed), 'file')} of {len(failed) + len(pixels)}:{listed(failed)}",
        SkippedFilesWarning,
        stacklevel=3,
    )
    return pixels


def split_by_file(names: list[str], test_fraction: float) -> tuple[list[str], list[str]]:
    """Return the names to train on and the names to hold out, in the given order; neither side is empty.

    Raises:
        DataError: `test_fraction` is not between 0 and 1, or there are fewer than two names.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if len(names) < 2:
        raise DataError(f"a split needs at least two files, got {len(names)}")
    position = {
        name: int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
        for name in names
    }
    # A small folder may fall on one side entirely: then the file nearest to the threshold changes sides.
    lowest, highest = min(names, key=position.__getitem__), max(names, key=position.__getitem__)
    test = [name for name in names if name != highest and (name == lowest or position[name] < test_fraction)]
    return [name for name in names if name not in set(test)], test


def read_image(path: StrPath, *, image_size: int, grayscale: bool) -> Tensor:
    """Return an image file as uint8 (C, image_size, image_size): the largest centered square, resized.

    16-bit gray is scaled to 8 bits; transparent pixels become white.

    Raises:
        DataError: the file is not a readable image; the message names it.
    """
    pillow = require("PIL.Image")
    ops = require("PIL.ImageOps")
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images and about odd metadata, and reads both.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with pillow.open(path) as file:
                # Cameras store the sensor's orientation beside the pixels.
                upright = _eight_bit(ops.exif_transpose(file)).convert("L" if grayscale else "RGB")
            square = ops.fit(upright, (image_size, image_size), method=pillow.Resampling.BICUBIC)
    except Exception as error:  # decoders raise errors of all kinds for damaged files
        raise DataError(f"{path} is not a readable image: {_why_unreadable(path, error)}") from error
    pixels = np.atleast_3d(np.array(square, dtype=np.uint8))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _why_unreadable(path: Path, error: Exception) -> str:
    pillow = require("PIL.Image")
    if isinstance(error, pillow.DecompressionBombError):
        return f"it has more than {2 * pillow.MAX_IMAGE_PIXELS} pixels, scale it down first"
    if path.is_dir():
        return "it is a folder"
    if isinstance(error, pillow.UnidentifiedImageError):
        return "unknown format" if path.stat().st_size else "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def write_images(root: StrPath, images: Tensor, first: int, subfolders: Sequence[str] | None = None) -> None:
    """Write images (N, C, H, W), float in [0, 1], with one or three channels, as PNG files numbered from `first`.

    Args:
        root: an existing folder.
        subfolders: for each image, the folder in `root` that it is written to.
    """
    root = Path(root)
    for row, image in enumerate(images):
        folder = root / subfolders[row] if subfolders else root
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{first + row:06d}.png", image, "png")


def write_image(path: StrPath | BinaryIO, image: Tensor, ending: str) -> None:
    """Write an image (C, H, W), float in [0, 1], with one or three channels, in the format of an `ending`.

    Args:
        path: file to write, which need not have that ending, or a file that is open for writing.
        image: the image.
        ending: one of `WRITTEN`.
    """
    pillow = require("PIL.Image")
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).cpu().numpy()
    kind = pillow.registered_extensions()["." + ending.lower().lstrip(".")]
    pillow.fromarray(pixels).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))


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
