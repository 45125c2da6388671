"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path

import torch

import fastvq
from fastvq.data import Images
from fastvq.data.folder import read_image
from fastvq.data.images import to_float
from fastvq.models import VQVAE
from fastvq.training.build import load_images
from fastvq.training.checkpoint import load_latest
from fastvq.training.evaluation import Evaluation, evaluate, psnr_db, reconstruct
from fastvq.training.metrics import read_metrics
from fastvq.training.trainer import Trainer

from . import plots
from .indices import FOLDER
from .load import load_model

_SHOWN = 16
_SHOWN_AS_CODES = 3
_CAPTION = (
    "Below each image, what the decoder makes of its codes. None of these images was trained on: outlines and shading"
    " should match; fine print and texture are what the codes leave out."
)


def shown_rows(images: Images) -> list[int]:
    """Return the held-out images to draw: of each class in turn where there are classes, else the first ones."""
    if images.test_labels is None:
        return list(range(min(_SHOWN, len(images.test))))
    seen: dict[int, int] = {}
    turn = []
    for row, label in enumerate(images.test_labels.tolist()):
        turn.append((seen.setdefault(label, 0), label, row))
        seen[label] += 1
    return [row for _, _, row in sorted(turn)[:_SHOWN]]


def picture_reconstructions(folder: Path, model: VQVAE, images: Images, evaluation: Evaluation, *, step: int) -> Path:
    """Write `reconstructions.png` and return its path."""
    rows = shown_rows(images)
    device = next(model.parameters()).device
    originals = to_float(images.test[rows].to(device))
    restored, _ = reconstruct(model, originals)
    path = folder / "reconstructions.png"
    plots.save_reconstructions(
        path,
        originals,
        restored,
        [images.test_names[row] for row in rows],
        title=f"{images.name}: held-out images after {step} steps, {evaluation.psnr_db:.2f} dB",
        caption=_CAPTION,
    )
    return path


def picture_run(trainer: Trainer, evaluation: Evaluation) -> list[Path]:
    """Write all pictures of a run into its folder, and return their paths."""
    folder, model, images = trainer.folder, trainer.model, trainer.images
    paths = [picture_reconstructions(folder, model, images, evaluation, step=trainer.step)]
    codebook_size = trainer.config.codebook_size
    paths.append(folder / "curves.png")
    records = read_metrics(folder / "metrics.jsonl")
    plots.save_curves(paths[-1], records, codebook_size=codebook_size, title=f"{images.name}: training")
    if evaluation.perplexity is None or not isinstance(model.bottleneck, fastvq.VectorQuantize):
        return paths
    paths.append(folder / "usage.png")
    plots.save_usage(
        paths[-1],
        evaluation.counts,
        perplexity=evaluation.perplexity,
        title=f"{images.name}: codes of {len(images.test)} held-out images",
    )
    rows = shown_rows(images)[:_SHOWN_AS_CODES]
    originals = to_float(images.test[rows].to(trainer.device))
    restored, indices = reconstruct(model, originals)
    paths.append(folder / "codes.png")
    plots.save_codes(
        paths[-1],
        originals,
        indices,
        restored,
        model.bottleneck.codebook,
        title=f"{images.name}: images as integers",
    )
    return paths


def picture_prior(run: Path) -> Path:
    """Draw how the prior of a run learned, from its records, and return the picture's path."""
    config = load_latest(run).config
    folder = run / FOLDER
    plots.save_bits(
        folder / "curves.png",
        read_metrics(folder / "metrics.jsonl"),
        codebook_size=config.codebook_size,
        title=f"{Path(config.data).name}: the prior's training",
    )
    return folder / "curves.png"


def reconstruct_held_out(run: Path, path: Path) -> list[str]:
    """Draw held-out images of a run's data set beside their reconstructions; return lines to print."""
    model, config = load_model(run)
    images = load_images(config)
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
        caption=_CAPTION,
    )
    return [f"{len(images.test)} held-out images: {evaluation.psnr_db:.2f} dB"]


def reconstruct_files(run: Path, files: list[Path], path: Path) -> list[str]:
    """Draw image files beside their reconstructions by a run's model; return one line to print for each.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        DataError: a file is no readable image.
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
        title=f"{len(files)} images through the codes of {run}",
        caption="Below each image, as the model sees it, what the decoder makes of its codes. Images unlike those that"
        " the model was trained on lose more.",
    )
    errors = (restored - originals).square().flatten(1).mean(1).tolist()
    return [f"{file}: {psnr_db(error):.2f} dB" for file, error in zip(files, errors, strict=True)]
