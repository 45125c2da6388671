"""Emoji with their names, in the package.

Of the 1,769 pictures without "skin tone" in their name in the npm package `@iconify-json/noto` 1.2.9 (Google's Noto
Emoji, Apache License 2.0, see noto_emoji.LICENSE), these are the 1,689 with a category; the other 80 are pictures by
earlier names, skin tones under other names, and bare digits. resvg 0.5.0 rendered them at 256x256 on white, and the
mean of each 8x8 pixels is one of 32x32. The five pictures that several names share are examples with several captions.
To rebuild the file, byte for byte, from the unpacked package:

    python -c "from fastvq.data import noto_emoji; noto_emoji.build('package')"    # needs resvg-py and Pillow

Captions are the names, and the names with their categories; classes are the categories. Pictures are held out by the
first of their names.
"""

from __future__ import annotations

import io
import json
import lzma
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from fastvq.files import StrPath, write_whole

from .examples import Examples
from .fashion_mnist import LZMA_FILTERS
from .registry import NOTO
from .split import split_by_file

SHIPPED = Path(__file__).with_name("noto_emoji.npz.xz")
TEST_FRACTION = 0.1
_RENDERED, _REDUCED = 256, 8


def load_noto_emoji(path: StrPath = SHIPPED) -> Examples:
    """Return the emoji (N, 3, 32, 32) that `build` wrote; names of held-out ones are what they show."""
    with lzma.open(path) as file, np.load(io.BytesIO(file.read())) as arrays:
        pixels, held_out, labels = arrays["pixels"], arrays["held_out"], arrays["labels"]
        names, categories = arrays["names"].tolist(), tuple(arrays["categories"].tolist())
    captions = [_captions(own, categories[label]) for own, label in zip(names, labels, strict=True)]
    images, own_labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels).long()
    train, test = np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()
    return Examples(
        name=NOTO,
        train=images[train].contiguous(),
        test=images[test].contiguous(),
        test_names=tuple(names[row].partition("\n")[0] for row in test),
        train_labels=own_labels[train],
        test_labels=own_labels[test],
        class_names=categories,
        train_captions=tuple(captions[row] for row in train),
        test_captions=tuple(captions[row] for row in test),
    )


def _captions(names: str, category: str) -> str:
    """Return the captions of a picture, one a line: its names, and each with its category."""
    own = names.split("\n")
    return "\n".join([*own, *(f"{name}, {category.lower()}" for name in own)])


def build(package: StrPath, path: StrPath = SHIPPED) -> None:
    """Write the file of emoji from the unpacked npm package."""
    from PIL import Image
    from resvg_py import svg_to_bytes

    icons = json.loads((Path(package) / "icons.json").read_bytes())["icons"]
    categories = json.loads((Path(package) / "metadata.json").read_bytes())["categories"]
    category_of = {name: category for category, members in categories.items() for name in members}
    names_of = defaultdict(list)
    for name in sorted(category_of.keys() & icons.keys()):
        if "skin-tone" not in name:
            names_of[icons[name]["body"]].append(name)
    # The first name of a picture stands for all.
    bodies = sorted(names_of, key=lambda body: names_of[body][0])
    firsts = [names_of[body][0] for body in bodies]
    pictures = []
    for body in bodies:
        drawn = svg_to_bytes(
            svg_string='<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' width="{_RENDERED}" height="{_RENDERED}" viewBox="0 0 128 128">{body}</svg>',
            background="white",
        )
        pictures.append(np.asarray(Image.open(io.BytesIO(bytes(drawn))).convert("RGB").reduce(_REDUCED)))
    held_out = set(split_by_file(firsts, TEST_FRACTION)[1])
    known = sorted(categories)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        pixels=np.stack(pictures),
        names=np.array(["\n".join(name.replace("-", " ") for name in names_of[body]) for body in bodies]),
        categories=np.array(known),
        labels=np.array([known.index(category_of[name]) for name in firsts], np.uint8),
        held_out=np.array([name in held_out for name in firsts]),
    )
    write_whole(path, lzma.compress(buffer.getvalue(), filters=LZMA_FILTERS))
