"""Images in the usual formats, to compare sizes with: all of them on one sheet, as one file."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.extras import require
from fastvq.training.evaluation import psnr_db

BEST = 100
"""The highest quality of WebP."""


def format_sizes(images: Tensor, psnr_target: float) -> list[dict[str, Any]]:
    """Name, bytes and PSNR (None: lossless) of uint8 images (N, C, H, W) as PNG, WebP, and WebP with loss: the lowest
    quality that is at least as close to the originals as psnr_target, in dB. The sheet spares each file's header."""
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
    for quality in range(BEST + 1):
        data = _saved(picture, "WEBP", quality=quality, method=6)
        with library.open(io.BytesIO(data)) as restored:
            error = np.asarray(restored.convert(picture.mode), np.float64) - sheet
        psnr = psnr_db(float(np.mean((error / 255) ** 2)))
        if psnr >= psnr_target or quality == BEST:
            sizes.append({"name": f"WebP, quality {quality}", "bytes": len(data), "psnr_db": psnr})
            break
    return sizes


def _sheet(images: Tensor) -> Any:
    """All images side by side, black where there is none: (rows H, columns W) or (rows H, columns W, C)."""
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
