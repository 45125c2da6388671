"""Clips of animated emoji, in the package.

The 134 animations of the npm package `@lobehub/fluent-emoji-anim-1` 1.0.0 (Microsoft's Fluent Emoji, MIT license, see
emoji_clips.LICENSE) that are no variants of others: without those whose file names hold a skin tone, a gender sign or a
joiner, and without still images. From the first frame on, 17 frames were taken at 6 a second, about the length of an
animation, on white, scaled from 256x256 to 32x32 pixels: by `read_video(path, VideoFormat(17, 32, frame_rate=6))`.
Names are those of Unicode. Clips to learn from keep 64 of the 256 levels of a color; clips held out are exact.
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq.files import StrPath, write_whole

from .examples import Examples
from .fashion_mnist import LZMA_FILTERS
from .registry import EMOJI
from .split import split_by_file

SHIPPED = Path(__file__).with_name("emoji_clips.npz.xz")
TEST_FRACTION = 0.1
_LEVELS = 63


def load_emoji_clips(path: StrPath = SHIPPED) -> Examples:
    """Return the clips (N, 3, 17, 32, 32) that `write_clips` wrote, those held out by their names.

    Names of held-out clips are what they show, and captions of all.
    """
    with lzma.open(path) as file, np.load(io.BytesIO(file.read())) as arrays:
        levels = arrays["train"].astype(np.uint16)
        train = ((levels * 255 + _LEVELS // 2) // _LEVELS).astype(np.uint8)
        names = {split: tuple(arrays[f"{split}_names"].tolist()) for split in ("train", "test")}
        test = arrays["test"]
    return Examples(
        name=EMOJI,
        train=_channels_first(train),
        test=_channels_first(test),
        test_names=names["test"],
        train_captions=names["train"],
        test_captions=names["test"],
        noun=("clip", "clips"),
    )


def write_clips(clips: Tensor, names: list[str], path: StrPath = SHIPPED) -> None:
    """Write the file of clips (N, 3, T, H, W), uint8, with a name for each."""
    pixels = clips.permute(0, 2, 3, 4, 1).numpy()
    rows = {name: row for row, name in enumerate(names)}
    train, test = split_by_file(sorted(names), TEST_FRACTION)
    levels = (pixels[[rows[name] for name in train]].astype(np.uint16) * _LEVELS + 127) // 255
    buffer = io.BytesIO()
    np.savez(
        buffer,
        train=levels.astype(np.uint8),
        train_names=np.array(train),
        test=pixels[[rows[name] for name in test]],
        test_names=np.array(test),
    )
    write_whole(path, lzma.compress(buffer.getvalue(), filters=LZMA_FILTERS))


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).contiguous()
