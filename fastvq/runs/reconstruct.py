"""Reconstructions of images by a run's model, beside the originals."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvq.data.folder import read_image
from fastvq.data.images import to_float
from fastvq.training.evaluation import evaluate, psnr_db, reconstruct

from . import plots
from .load import load_model, run_images
from .pictures import RECONSTRUCTIONS_CAPTION, shown_rows


def reconstruct_held_out(run: Path, path: Path) -> list[str]:
    """Draw held-out images of a run's data set beside their reconstructions; return lines to print."""
    model, _ = load_model(run)
    images = run_images(run)
    evaluation = evaluate(model, images.test)
    rows = shown_rows(images)
    originals = to_float(images.test[rows])
    restored, _ = reconstruct(model, originals)
    plots.save_reconstructions(
        path,
        originals,
        restored,
        [images.test_names[row] for row in rows],
        title=f"{images.name}: held-out images, {evaluation.psnr_db:.2f} dB",
        caption=RECONSTRUCTIONS_CAPTION,
    )
    return [f"{len(images.test)} held-out images: {evaluation.psnr_db:.2f} dB"]


def reconstruct_files(run: Path, files: list[Path], path: Path) -> list[str]:
    """Draw image files beside their reconstructions by a run's model; return a line to print for each.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        DataError: a file is not a readable image.
    """
    model, config = load_model(run)
    pixels = [read_image(file, image_size=config.image_size, grayscale=config.grayscale) for file in files]
    originals = to_float(torch.stack(pixels))
    restored, _ = reconstruct(model, originals)
    plots.save_reconstructions(
        path,
        originals,
        restored,
        [file.name for file in files],
        title=f"{len(files)} images encoded and decoded by {run}",
        caption="Below each image, as the model sees it, its reconstruction from indices. Images unlike those that the"
        " model was trained on lose more.",
    )
    errors = (restored - originals).square().flatten(1).mean(1).tolist()
    return [f"{file}: {psnr_db(error):.2f} dB" for file, error in zip(files, errors, strict=True)]
