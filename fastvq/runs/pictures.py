"""Pictures of a training run: reconstructions, curves, codebook usage, images as indices.

This module loads the run and computes what is shown; `plots` draws it. Pictures of a prior: `sample_pictures`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.data.registry import name_of
from fastvq.errors import counted
from fastvq.files import StrPath
from fastvq.models import VQVAE
from fastvq.models.adapters import Adapter
from fastvq.training.checkpoint import load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.evaluation import Evaluation, reconstruct
from fastvq.training.metrics import read_metrics
from fastvq.training.trainer import Trainer

from . import plots
from .load import PRIOR_FOLDER

_SHOWN = 16
_SHOWN_AS_INDICES = 3
RECONSTRUCTIONS_CAPTION = (
    "Below each image, its reconstruction from indices. None of these images was trained on: outlines and shading"
    " should match; fine detail is lost."
)


@contextlib.contextmanager
def failures_as_warnings(what: str) -> Iterator[None]:
    """Warn if a picture or a page cannot be made, for whatever reason: what has been trained is saved all the same.

    A full disk is such a reason: the next checkpoint will fail of it with an error.
    """
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} failed: {error}", stacklevel=1)


def shown_rows(images: Images, shown: int = _SHOWN) -> list[int]:
    """Return rows of held-out images to draw: of each class in turn, or of each folder, else spread over all.

    Within a class, rows are spread over it.
    """
    labels: list[Any]
    if images.test_labels is not None:
        labels = images.test_labels.tolist()
    else:
        labels = [name.rpartition("/")[0] for name in images.test_names]
    groups: dict[Any, list[int]] = {}
    for row, group in enumerate(labels):
        groups.setdefault(group, []).append(row)
    chosen = [groups[group] for group in sorted(groups)]
    chosen = [chosen[at] for at in spread(len(chosen), shown)]
    each = [min(len(rows), shown) for rows in chosen]
    # As many of each as there is room for: where one group has few, the others have more.
    while sum(each) > shown:
        each[max(range(len(each)), key=lambda at: (each[at], at))] -= 1
    turns = [[rows[at] for at in spread(len(rows), count)] for rows, count in zip(chosen, each, strict=True)]
    return [rows[turn] for turn in range(max(each, default=0)) for rows in turns if turn < len(rows)]


def spread(count: int, shown: int) -> list[int]:
    """Return at most `shown` of the numbers below `count`, evenly spread."""
    shown = min(count, shown)
    return [(2 * n + 1) * count // (2 * shown) for n in range(shown)]


def picture_reconstructions(
    folder: StrPath, model: VQVAE, images: Images, evaluation: Evaluation, *, step: int, captioned: bool = True
) -> Path:
    """Draw held-out images beside their reconstructions in `reconstructions.png` and return its path."""
    rows = shown_rows(images)
    device = next(model.parameters()).device
    originals = to_float(images.test[rows].to(device))
    restored, _ = reconstruct(model, originals)
    path = Path(folder) / "reconstructions.png"
    plots.save_reconstructions(
        path,
        originals,
        restored,
        [images.test_names[row] for row in rows],
        title=f"{images.name}: held-out images after {counted(step, 'step')}, {evaluation.psnr_db:.2f} dB",
        caption=RECONSTRUCTIONS_CAPTION,
        captioned=captioned,
    )
    return path


def picture_run(trainer: Trainer, evaluation: Evaluation, *, captioned: bool = True) -> list[Path]:
    """Draw curves, usage and images as indices of a finished run in its folder, and return the paths.

    The reconstructions are not among them: `picture_reconstructions` draws them at each evaluation. A picture that
    fails is a warning.
    """
    folder, model, images = trainer.folder, trainer.trained, trainer.images
    adapter = model.adapter
    sizes = adapter.stage_sizes() if evaluation.stage_counts else (1,)
    paths = []
    with failures_as_warnings("picture of curves"):
        path = folder / "curves.png"
        records = read_metrics(folder / "metrics.jsonl")
        title = f"{images.name}: training"
        highest = sum(sizes) / len(sizes)
        plots.save_curves(path, records, codebook_size=highest, title=title, captioned=captioned)
        paths.append(path)
    if evaluation.perplexity is None:
        return paths
    with failures_as_warnings("picture of usage"):
        path = folder / "usage.png"
        plots.save_usage(
            path,
            evaluation.stage_counts,
            perplexity=evaluation.perplexity,
            title=f"{images.name}: codebook usage on {counted(len(images.test), 'held-out image')}",
            captioned=captioned,
        )
        paths.append(path)
    with failures_as_warnings("picture of indices"):
        path = folder / "indices.png"
        rows = shown_rows(images, _SHOWN_AS_INDICES)
        originals = to_float(images.test[rows].to(trainer.device))
        restored, indices = reconstruct(model, originals)
        plots.save_indices(
            path,
            originals,
            adapter.stages(indices),
            restored,
            _vectors_to_color(adapter),
            title=f"{images.name}: images as indices",
            captioned=captioned,
        )
        paths.append(path)
    return paths


def _vectors_to_color(adapter: Adapter) -> list[Tensor]:
    """Return vectors (K, D) for each codebook; the numbers of the codes where there are no vectors."""
    sizes, vectors = adapter.stage_sizes(), adapter.code_vectors()
    if vectors is None:
        return [torch.arange(size, dtype=torch.float32)[:, None] for size in sizes]
    return list(vectors) if isinstance(vectors, tuple) else [vectors] * len(sizes)


def picture_prior(run: StrPath, *, captioned: bool = True) -> Path:
    """Draw the training curve of a run's prior from its records, and return the picture's path."""
    config = load_latest(run).config
    folder = Path(run) / PRIOR_FOLDER
    learned = load_latest(folder, PriorConfig).built_from["settings"]
    plots.save_bits(
        folder / "curves.png",
        read_metrics(folder / "metrics.jsonl"),
        codebook_size=learned["codebook_size"],
        title=f"{name_of(config.data)}: training of the prior",
        captioned=captioned,
    )
    return folder / "curves.png"
