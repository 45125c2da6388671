"""Small folders of files of each modality, and settings of small models of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_COUNT = 8


@dataclass(frozen=True)
class FolderOfFiles:
    """Files of a modality.

    Attributes:
        write: writes at least eight files of noise to a folder, which it makes.
        settings: settings of a small model of them, of this modality alone.
    """

    write: Callable[[Path], None]
    settings: dict[str, Any]


def _write_images(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(_COUNT):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")


def _write_clips(folder: Path) -> None:
    import torch

    from fastvq.data.video_io import write_video

    folder.mkdir(exist_ok=True)
    for number in range(_COUNT):
        noise = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(number))
        write_video(folder / f"v{number}.webp", noise, 12, "webp")
    write_video(folder / "film.mp4", noise, 12, "mp4")


def _write_sounds(folder: Path) -> None:
    import torch

    from fastvq.data.audio_io import write_audio

    folder.mkdir(exist_ok=True)
    for number in range(_COUNT):
        noise = torch.rand(1, 128, generator=torch.Generator().manual_seed(number)) - 0.5
        ending = ("wav", "flac")[number % 2]
        write_audio(folder / f"s{number}.{ending}", noise, 8000, ending)


_SMALL = {"width": 8, "residual_width": 4, "encoder_blocks": 1, "decoder_blocks": 1}
FOLDERS = {
    "image": FolderOfFiles(_write_images, {"image_size": 16, **_SMALL}),
    "video": FolderOfFiles(_write_clips, {"frame_size": 16, "frames": 5, "frame_rate": 12.0, **_SMALL}),
    "audio": FolderOfFiles(
        _write_sounds,
        {"sample_rate": 8000, "clip_length": 128, "crop_length": 64, "width": 4, "strides": "4,8", "kernel": 3},
    ),
}
"""By the name of the modality."""
