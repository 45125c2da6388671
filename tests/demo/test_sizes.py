"""Sizes of images in the usual formats."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.demo.sizes import _sheet, animation_sizes, format_sizes

from .squares import squares


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_of_the_usual_formats(channels):
    images, _ = squares(7, channels)
    sheet = _sheet(images)
    assert sheet.shape == ((36, 36) if channels == 1 else (36, 36, 3))
    assert np.array_equal(sheet[12:24, 12:24].reshape(12, 12, channels), images[4].permute(1, 2, 0).numpy())
    assert not sheet[24:, 12:].any()
    png, lossless, lossy = format_sizes(images, 25.0)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG", optimize=True)
    assert png == {"name": "PNG", "bytes": len(stream.getvalue()), "psnr_db": None}
    assert lossless["psnr_db"] is None
    assert lossy["psnr_db"] >= 25.0
    assert lossy["bytes"] < lossless["bytes"]
    assert format_sizes(images, 28.0)[2]["psnr_db"] > lossy["psnr_db"]


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_of_moving_formats(channels):
    images, _ = squares(8, channels)
    clips = torch.stack([images.roll(frame, -1) for frame in range(3)], 2)[..., :12, :12]
    lossless, *lossy = animation_sizes(clips, 24.0, frame_rate=5)
    assert lossless["psnr_db"] is None
    for name in ("animated WebP", "H.264"):
        smallest, *enough = [size for size in lossy if size["name"].startswith(name)]
        best = enough[0] if enough else smallest
        assert best["psnr_db"] >= 24.0
        assert smallest["bytes"] <= best["bytes"] < lossless["bytes"]
        assert not enough or smallest["psnr_db"] < 24.0
    pytest.importorskip("av")
