"""Pictures of a training run: reconstructions, curves, codebook usage, images as indices.

This module loads the run and computes what is shown; `plots` draws it. Pictures of a prior: `sample_pictures`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import fastvq
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.models import VQVAE
from fastvq.training.checkpoint import load_latest
from fastvq.training.evaluation import Evaluation, reconstruct
from fastvq.training.metrics import read_metrics
from fastvq.training.trainer import Trainer

from . import plots
from .load import PRIOR_FOLDER

_SHOWN = 16
_SHOWN_AS_INDICES = 3
RECONSTRUCTIONS_CAPTION = (
    "Below each image, its reconstruction from indices. None of these images was trained on: outlines and shading"
    " should match; fine print and texture are lost."
)


@contextlib.contextmanager
def failures_as_warnings(picture: str) -> Iterator[None]:
    """Warn if a picture cannot be drawn or written, for whatever reason: what has been trained is saved all the same.

    A full disk is such a reason: the next checkpoint will fail of it with an error.
    """
    try:
        yield
    except Exception as error:
        warnings.warn(f"picture of {picture} failed: {error}", stacklevel=1)


def shown_rows(images: Images) -> list[int]:
    """Return the rows of held-out images to draw: of each class in turn if there are classes, else the first ones."""
    if images.test_labels is None:
        return list(range(min(_SHOWN, len(images.test))))
    seen: dict[int, int] = {}
    turn = []
    for row, label in enumerate(images.test_labels.tolist()):
        turn.append((seen.setdefault(label, 0), label, row))
        seen[label] += 1
    return [row for _, _, row in sorted(turn)[:_SHOWN]]


def picture_reconstructions(folder: Path, model: VQVAE, images: Images, evaluation: Evaluation, *, step: int) -> Path:
    """Draw held-out images beside their reconstructions in `reconstructions.png` and return its path."""
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
        caption=RECONSTRUCTIONS_CAPTION,
    )
    return path


def picture_run(trainer: Trainer, evaluation: Evaluation) -> list[Path]:
    """Draw curves, usage and images as indices of a finished run in its folder, and return the paths.

    The reconstructions are not among them: `picture_reconstructions` draws them at each evaluation. A picture that
    fails is a warning.
    """
    folder, model, images = trainer.folder, trainer.model, trainer.images
    codebook_size = trainer.config.codebook_size
    paths = []
    with failures_as_warnings("curves"):
        path = folder / "curves.png"
        records = read_metrics(folder / "metrics.jsonl")
        plots.save_curves(path, records, codebook_size=codebook_size, title=f"{images.name}: training")
        paths.append(path)
    if evaluation.perplexity is None or not isinstance(model.bottleneck, fastvq.VectorQuantize):
        return paths
    with failures_as_warnings("usage"):
        path = folder / "usage.png"
        plots.save_usage(
            path,
            evaluation.counts,
            perplexity=evaluation.perplexity,
            title=f"{images.name}: codebook usage on {len(images.test)} held-out images",
        )
        paths.append(path)
    with failures_as_warnings("indices"):
        path = folder / "indices.png"
        rows = shown_rows(images)[:_SHOWN_AS_INDICES]
        originals = to_float(images.test[rows].to(trainer.device))
        restored, indices = reconstruct(model, originals)
        plots.save_indices(
            path,
            originals,
            indices,
            restored,
            model.bottleneck.codebook,
            title=f"{images.name}: images as indices",
        )
        paths.append(path)
    return paths


def picture_prior(run: Path) -> Path:
    """Draw the training curve of a run's prior from its records, and return the picture's path."""
    config = load_latest(run).config
    folder = run / PRIOR_FOLDER
    plots.save_bits(
        folder / "curves.png",
        read_metrics(folder / "metrics.jsonl"),
        codebook_size=config.codebook_size,
        title=f"{Path(config.data).name}: training of the prior",
    )
    return folder / "curves.png"
