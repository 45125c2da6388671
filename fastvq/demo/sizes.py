"""Sizes of the held-out images: as pixels, in the usual image formats, and as indices coded by each model."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
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


def animation_sizes(clips: Tensor, psnr_target: float, *, frame_rate: float) -> list[dict[str, Any]]:
    """Return name, bytes and PSNR (None: lossless) of uint8 clips (N, C, T, H, W) as animated WebP and as H.264.

    All clips are on one sheet, which saves headers. Lossy WebP has its lowest quality, and the lowest whose PSNR is at
    least `psnr_target`, in dB; H.264 likewise, where PyAV is installed.
    """
    library = require("PIL.Image")
    sheets = np.stack([_sheet(frames) for frames in clips.unbind(2)])
    pictures = [library.fromarray(sheet) for sheet in sheets]
    duration, kind = round(1000 / frame_rate), "gray" if sheets.ndim == 3 else "rgb24"

    def animated(**options: Any) -> bytes:
        more = {"save_all": True, "append_images": pictures[1:], "duration": duration, "method": 6}
        return _saved(pictures[0], "WEBP", **more, **options)

    def webp_frames(data: bytes) -> Any:
        with library.open(io.BytesIO(data)) as file:
            numbers = range(file.n_frames)
            return np.stack([np.asarray(_frame(file, number).convert(pictures[0].mode)) for number in numbers])

    sizes: list[dict[str, Any]] = [
        {"name": "animated WebP, lossless", "bytes": len(animated(lossless=True, quality=100)), "psnr_db": None}
    ]
    codecs: list[tuple[str, Sequence[int], Callable[[int], bytes], Callable[[bytes], Any]]] = [
        ("animated WebP, quality", range(BEST + 1), lambda quality: animated(quality=quality), webp_frames)
    ]
    if importlib.util.find_spec("av"):
        film = partial(_h264, sheets, kind, frame_rate)
        codecs.append(("H.264, crf", range(51, -1, -1), film, partial(_film_frames, kind)))
    for name, settings, encode, decode in codecs:
        for setting in settings:
            data = encode(setting)
            error = decode(data).astype(np.float64).reshape(sheets.shape) - sheets
            psnr = psnr_db(float(np.mean((error / 255) ** 2)))
            reached = psnr >= psnr_target or setting == settings[-1]
            if reached or setting == settings[0]:
                sizes.append({"name": f"{name} {setting}", "bytes": len(data), "psnr_db": psnr})
            if reached:
                break
    return sizes


def _frame(file: Any, number: int) -> Any:
    file.seek(number)
    return file


def _h264(sheets: Any, kind: str, frame_rate: float, crf: int) -> bytes:
    """Return an MP4 file of frames (T, h, w), gray, or (T, h, w, 3), rgb24."""
    av, stream = require("av", "video"), io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        video.height, video.width = sheets.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.options = {"crf": str(crf), "preset": "veryslow"}
        for sheet in sheets:
            container.mux(video.encode(av.VideoFrame.from_ndarray(sheet, format=kind)))
        container.mux(video.encode())
    return stream.getvalue()


def _film_frames(kind: str, data: bytes) -> Any:
    with require("av", "video").open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format=kind) for frame in container.decode(video=0)])


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
