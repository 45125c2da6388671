"""Images in files: reading, in one format, and writing."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastvq.errors import DataError, first_line
from fastvq.extras import require
from fastvq.files import StrPath

from .image_format import ImageFormat
from .reader import Reader

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the files that are images."""
WRITTEN = SUFFIXES - {".gif"}
"""Endings of the images that `write_image` writes."""


def read_image(path: StrPath, format: ImageFormat, content: bytes | None = None) -> Tensor:
    """Return an image as uint8 (C, height, width).

    16-bit gray is scaled to 8 bits; transparent pixels become white.

    Args:
        path: the image file.
        format: size and color.
        content: the file's bytes where it stands in an archive; `path` then only names it.

    Raises:
        DataError: the file is not a readable image; the message names it.
    """
    pillow = require("PIL.Image")
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images and about odd metadata, and reads both.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with pillow.open(path if content is None else BytesIO(content)) as file:
                # Cameras store the sensor's orientation beside the pixels.
                return fit_image(require("PIL.ImageOps").exif_transpose(file), format)
    except Exception as error:  # decoders raise errors of all kinds for damaged files
        raise DataError(f"{path} is not a readable image: {why_unreadable(path, error, content)}") from error


def fit_image(image: Any, format: ImageFormat) -> Tensor:
    """Return a Pillow image as uint8 (C, height, width) of a format; transparent pixels become white.

    Raises:
        ValueError: the range of its pixels is unknown.
    """
    image = _eight_bit(image).convert("L" if format.grayscale else "RGB")
    size, ops = (format.width, format.height), require("PIL.ImageOps")
    bicubic = require("PIL.Image").Resampling.BICUBIC
    if format.fit == "pad":
        image = ops.pad(image, size, method=bicubic)
    else:
        image = image.resize(size, bicubic) if format.fit == "stretch" else ops.fit(image, size, method=bicubic)
    pixels = np.atleast_3d(np.array(image, dtype=np.uint8))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def why_unreadable(path: StrPath, error: Exception, content: bytes | None) -> str:
    """Return in words why a decoder has failed on a file, or on the content of one in an archive."""
    pillow, path = require("PIL.Image"), Path(path)
    if isinstance(error, pillow.DecompressionBombError):
        return f"it has more than {2 * pillow.MAX_IMAGE_PIXELS} pixels, scale it down first"
    if path.is_dir():
        return "it is a folder"
    if not content and (content is not None or (path.is_file() and not path.stat().st_size)):
        return "the file is empty"
    if isinstance(error, pillow.UnidentifiedImageError):
        return "unknown format"
    return getattr(error, "strerror", None) or first_line(error)


def _read_one(path: StrPath, format: ImageFormat, content: bytes | None = None) -> Tensor:
    return read_image(path, format, content)[None]


IMAGES = Reader(("image", "images"), SUFFIXES, _read_one, "uint8", WRITTEN)


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
