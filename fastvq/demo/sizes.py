"""Sizes of the held-out images: as pixels, in the usual image formats, and as indices coded by each model."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq import coding
from fastvq.data import Examples
from fastvq.extras import require, tracked
from fastvq.modalities.image import psnr_db

BEST = 100
"""The highest quality of WebP."""
_LABELS = {
    "uniform": "indices, log2 K bits each",
    "huffman": "indices, Huffman (ideal, without its table)",
    "static": "indices, static model",
    "adaptive": "indices, adaptive model",
}


def measure_sizes(
    examples: Examples, indices: Tensor, codebook_size: int, *, psnr_db: float, prior_bits: float, prior_file: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure the held-out images as pixels, in the usual formats, and as indices coded by each model.

    Args:
        images: the data set.
        indices: (N, *grid), the indices of the held-out images.
        codebook_size: K.
        psnr_db: PSNR of the images decoded from the indices, in dB.
        prior_bits: -log2 p of all indices under the prior.
        prior_file: size in bytes of the file coded with the prior.

    Returns:
        Bits per index by name of the model, and records of "name", "bytes", "psnr_db" and "bits_per_dimension".
    """
    pixels = examples.test.numel()
    measured = coding.measure(indices.long(), codebook_size)
    bits = {name: size["bits_per_index"] for name, size in measured.items()}
    bits["prior"] = prior_bits / indices.numel()
    known, stored = (", class known", " with labels") if examples.test_labels is not None else ("", "")
    sizes: list[dict[str, Any]] = [
        {"name": "pixels", "bytes": pixels, "psnr_db": None},
        *format_sizes(examples.test, psnr_db),
        *({"name": _LABELS[name], "bytes": int(measured[name]["bytes"]), "psnr_db": psnr_db} for name in _LABELS),
        {"name": f"indices, learned prior (ideal{known})", "bytes": round(prior_bits / 8), "psnr_db": psnr_db},
        {"name": f"indices, learned prior, whole file{stored}", "bytes": prior_file, "psnr_db": psnr_db},
    ]
    return bits, [size | {"bits_per_dimension": 8 * size["bytes"] / pixels} for size in sizes]


def format_sizes(images: Tensor, psnr_target: float) -> list[dict[str, Any]]:
    """Return name, bytes and PSNR (None: lossless) of uint8 images (N, C, H, W) as PNG, lossless and lossy WebP.

    All images are on one sheet, which saves a header for each. The lossy WebP has the lowest quality whose PSNR is at
    least `psnr_target`, in dB.
    """
    library = require("PIL.Image")
    sheet = _sheet(images)
    picture = library.fromarray(sheet)
    sizes = [
        {"name": "PNG", "bytes": len(_saved(picture, "PNG", optimize=True)), "psnr_db": None},
        {
            "name": "WebP, lossless",
            "bytes": len(_saved(picture, "WEBP", lossless=True, quality=100, method=6)),
            "psnr_db": None,
        },
    ]
    for quality in tracked(range(BEST + 1), BEST + 1, "quality"):
        data = _saved(picture, "WEBP", quality=quality, method=6)
        with library.open(io.BytesIO(data)) as restored:
            error = np.asarray(restored.convert(picture.mode), np.float64) - sheet
        psnr = psnr_db(float(np.mean((error / 255) ** 2)))
        if psnr >= psnr_target or quality == BEST:
            sizes.append({"name": f"WebP, quality {quality}", "bytes": len(data), "psnr_db": psnr})
            break
    return sizes


def _sheet(images: Tensor) -> Any:
    """Return all images on one sheet, spare cells black: (rows H, columns W) or (rows H, columns W, C)."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = torch.zeros(rows * columns - len(images), *images.shape[1:], dtype=images.dtype)
    cells = torch.cat([images, blank]).unflatten(0, (rows, columns))
    sheet = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return sheet.squeeze(-1).contiguous().numpy()


def _saved(picture: Any, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()
