"""Effect of the losses of a VQ-VAE on PSNR, SSIM and pictures: docs/losses.md has the results.

    python benchmarks/losses.py --photographs FOLDER --out OUT    # about ten minutes of one core

FOLDER holds photographs. Each is scaled to a height of 320 pixels and cut into tiles of 64x64; those of every fifth
photograph are held out. Without it only the emoji of the package are learned. OUT gets the tiles, the runs, a table and
a picture for each data set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fastvq
from fastvq.data.examples import to_float
from fastvq.data.image_io import IMAGES
from fastvq.modalities import ImageConfig
from fastvq.models.perceptual import load_feature_network, perceptual_distance
from fastvq.runs.evaluate import evaluate_run
from fastvq.runs.load import run_examples
from fastvq.training import Trainer, load_examples

TILE, HEIGHT, HELD_OUT, SHOWN = 64, 320, 5, 10
PERCEPTUAL: dict[str, Any] = {"perceptual_weight": 1.0}
LOSSES: dict[str, dict[str, Any]] = {
    "L2": {},
    "L1": {"reconstruction_loss": "l1"},
    "L2, perceptual": PERCEPTUAL,
    "L2, adversarial": {"adversarial_weight": 0.8},
    "L2, perceptual, adversarial": {**PERCEPTUAL, "adversarial_weight": 0.8},
}
COMMON: dict[str, Any] = {
    "grayscale": False,
    "width": 64,
    "learning_rate": 2e-3,
    "batch_size": 16,
    "warmup_steps": 20,
    "discriminator_width": 32,
}


def cut_tiles(photographs: Path, folder: Path) -> None:
    """Write the tiles of photographs to the subfolders "train" and "test" of a folder."""
    paths = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in IMAGES.suffixes)
    for number, path in enumerate(paths):
        part = folder / ("test" if number % HELD_OUT == 0 else "train")
        part.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image = image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.BOX)
        for top in range(0, image.height - TILE + 1, TILE):
            for left in range(0, image.width - TILE + 1, TILE):
                tile = image.crop((left, top, left + TILE, top + TILE))
                tile.save(part / f"{path.stem}-{top}-{left}.png")


def learned(config: ImageConfig, run: Path, data: str | None) -> dict[str, Any]:
    """Train a run, unless it is there, and return its measures on the held-out examples, or on all of `data`."""
    if not (run / "evaluation.json").exists():
        Trainer(config, load_examples(config), run).fit()
        evaluate_run(run, data=data)
    measures = json.loads((run / "evaluation.json").read_text())["measures"]
    return {name: value["value"] for name, value in measures.items()}


def picture(originals: Tensor, restored: Mapping[str, Tensor], path: Path, scale: int) -> None:
    """Write originals (N, 3, H, W) above the reconstructions of each run."""
    rows = [originals, *restored.values()]
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def compare(name: str, settings: dict[str, Any], out: Path, held_out: Path | None, scale: int) -> None:
    """Train a model with each loss and print their table."""
    network = load_feature_network()
    print(
        f"\n{name}\n\n| loss | PSNR (dB) | SSIM | distance of features | perplexity |\n|---|---|---|---|---|",
        flush=True,
    )
    restored: dict[str, Tensor] = {}
    for loss, own in LOSSES.items():
        run = out / name / loss.replace(", ", "-").lower()
        with torch.enable_grad():
            measures = learned(ImageConfig(**COMMON | settings | own), run, None if held_out is None else str(held_out))
        model = fastvq.load(run)
        stored = run_examples(run).test if held_out is None else load_examples(tiles(held_out)).train
        originals = to_float(stored)
        decoded = torch.cat([model.reconstruct(part) for part in originals.split(50)])
        distance = sum(
            len(x) * perceptual_distance(network, y, x).item()
            for x, y in zip(originals.split(50), decoded.split(50), strict=True)
        ) / len(originals)
        chosen = torch.linspace(0, len(originals) - 1, SHOWN).long()
        restored[loss] = decoded[chosen]
        print(
            f"| {loss} | {measures['psnr_db']:.2f} | {measures['ssim']:.4f} | {distance:.4f}"
            f" | {measures['perplexity']:.0f} |",
            flush=True,
        )
    picture(originals[chosen], restored, out / f"{name}.png", scale)


def tiles(folder: Path) -> ImageConfig:
    """Return settings that read a folder of tiles, one of which is held out."""
    return ImageConfig(data=str(folder), image_size=TILE, grayscale=False, test_fraction=1e-9)


def main() -> None:
    """Train and compare on emoji, and on photographs if there are any."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    schedule = {
        "steps": options.steps,
        "evaluate_every": options.steps,
        "checkpoint_every": options.steps,
        "adversarial_start": options.steps // 3,
    }
    if options.photographs is not None:
        folder = options.out / "tiles"
        if not folder.exists():
            cut_tiles(options.photographs, folder)
        photographs = {"data": str(folder / "train"), "image_size": TILE, "downsamples": 3, "test_fraction": 0.02}
        compare("photographs", photographs | schedule, options.out, folder / "test", 1)
    compare("emoji", {"data": "noto-emoji", "image_size": 32, "downsamples": 2} | schedule, options.out, None, 2)


if __name__ == "__main__":
    main()
