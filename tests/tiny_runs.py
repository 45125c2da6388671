"""Small data and short runs: a few of the shipped images, and a run of three steps on a folder of random images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.data import DATA_SETS, Examples, load_fashion_mnist
from fastvq.modalities import ImageConfig
from fastvq.training import Trainer, load_examples


def few_clothes(monkeypatch: pytest.MonkeyPatch) -> Examples:
    """Let the Fashion-MNIST subset be sixty images to learn from and twenty held out, and return them."""
    clothes = load_fashion_mnist()
    train, test = torch.arange(0, 5700, 95), torch.arange(0, 1000, 50)
    few = Examples(
        clothes.name,
        clothes.train[train],
        clothes.test[test],
        tuple(clothes.test_names[row] for row in test),
        clothes.train_labels[train],
        clothes.test_labels[test],
        class_names=clothes.class_names,
    )
    small = dataclasses.replace(DATA_SETS["fashion-mnist"], load=lambda: few)
    monkeypatch.setitem(DATA_SETS, "fashion-mnist", small)
    return few


def tiny_run(root: Path, *, count: int, grayscale: bool, **settings: Any) -> tuple[Path, Path]:
    """(run, images): folders in root; images become grids of 4 x 4 codes of 24, unless the settings say otherwise."""
    images = root / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    shape = (20, 24) if grayscale else (20, 24, 3)
    for n in range(count):
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(images / f"{n:02d}.png")
    defaults: dict[str, Any] = {
        "data": str(images),
        "image_size": 16,
        "grayscale": grayscale,
        "steps": 3,
        "codebook_size": 24,
        "dim": 8,
        "width": 8,
        "residual_width": 4,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "batch_size": 8,
        "warmup_steps": 1,
    }
    config = ImageConfig(**defaults | settings)
    Trainer(config, load_examples(config), root / "run").fit(progress=False)
    return root / "run", images
