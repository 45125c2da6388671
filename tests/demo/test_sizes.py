"""Sizes of images in the usual formats."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastvq.demo.sizes import _sheet, format_sizes

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
