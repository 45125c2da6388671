"""Pictures of a training run: reconstructions, curves, codebook usage, examples as indices.

This module loads the run and computes what is shown; `plots` draws it. Pictures of a prior: `sample_pictures`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.data import Examples
from fastvq.data.examples import to_float
from fastvq.data.registry import name_of
from fastvq.errors import counted
from fastvq.files import StrPath, whole
from fastvq.modalities import Modality, TrainConfig, modality_of
from fastvq.models import VQVAE
from fastvq.models.adapters import Adapter
from fastvq.training.checkpoint import load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.evaluation import Evaluation, reconstruct
from fastvq.training.metrics import read_metrics
from fastvq.training.trainer import Trainer

from . import plots
from .load import PRIOR_FOLDER

MEDIA = "media"
"""Subfolder of a run with what its page plays."""
_SHOWN = 16
_SHOWN_AS_INDICES = 3
_SHOWN_DECODED, _HEARD = 8, 4


@contextlib.contextmanager
def failures_as_warnings(what: str) -> Iterator[None]:
    """Warn if a picture or a page cannot be made, for whatever reason: what has been trained is saved all the same.

    A full disk is such a reason: the next checkpoint will fail of it with an error.
    """
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} failed: {error}", stacklevel=1)


def shown_rows(examples: Examples, shown: int = _SHOWN) -> list[int]:
    """Return rows of held-out examples to draw: of each class in turn, or of each folder, else spread over all.

    Within a class, rows are spread over it.
    """
    labels: list[Any]
    if examples.test_labels is not None:
        labels = examples.test_labels.tolist()
    else:
        labels = [name.rpartition("/")[0] for name in examples.test_names]
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


def reconstructions_caption(modality: Modality) -> str:
    """Return what a picture of held-out examples and their reconstructions shows."""
    one, many = modality.noun
    return (
        f"Below each {one}, its reconstruction from indices. None of these {many} was trained on: outlines and shading"
        " should match; fine detail is lost."
    )


def draw_reconstructions(
    path: StrPath,
    model: VQVAE,
    config: TrainConfig,
    originals: Tensor,
    names: Sequence[str],
    *,
    media: StrPath | None = None,
    **texts: Any,
) -> None:
    """Draw signals (N, C, *size) above their reconstructions, each with its own measure.

    Args:
        path: file to write; its ending is in `figures.FORMATS`, or among those that the modality plays.
        model, config: the model and its settings.
        originals: the signals.
        names: their names.
        media: folder that gets files to play beside the picture.
        texts: title, caption and captioned of `plots.save_reconstructions`.
    """
    modality = modality_of(config.modality)
    objective = modality.objective(config).to(originals.device)
    restored, _ = reconstruct(model, originals)
    played = {"original": originals, "decoded": restored}
    if media is not None:
        modality.write_media(media, Path(path).stem, played, config)
    if Path(path).suffix.lower() in modality.played:
        with whole(path) as file:
            modality.play(file, played, config, Path(path).suffix)
        return
    measure = modality.measures[objective.measure]
    errors = objective.errors(restored, originals).clamp_min(1e-12).tolist()
    notes = [measure.note(objective.value(error)) for error in errors]
    images, decoded = (modality.as_images(x, config) for x in (originals, restored))
    plots.save_reconstructions(path, images, decoded, names, notes, **texts)


def picture_reconstructions(trainer: Trainer, evaluation: Evaluation, *, captioned: bool = True) -> Path:
    """Draw held-out examples beside their reconstructions in `reconstructions.png` and return its path."""
    examples, modality = trainer.examples, trainer.modality
    rows = shown_rows(examples)
    path = trainer.folder / "reconstructions.png"
    quality = modality.measures[evaluation.measure].text(evaluation.value)
    draw_reconstructions(
        path,
        trainer.trained,
        trainer.config,
        to_float(examples.test[rows].to(trainer.device)),
        [examples.test_names[row] for row in rows],
        title=f"{examples.name}: held-out {modality.noun[1]} after {counted(trainer.step, 'step')}, {quality}",
        caption=reconstructions_caption(modality),
        captioned=captioned,
        media=trainer.folder / MEDIA,
    )
    return path


def picture_run(trainer: Trainer, evaluation: Evaluation, *, captioned: bool = True) -> list[Path]:
    """Draw curves, usage and examples as indices of a finished run in its folder, and return the paths.

    The reconstructions are not among them: `picture_reconstructions` draws them at each evaluation. A picture that
    fails is a warning.
    """
    folder, model, examples, modality = trainer.folder, trainer.trained, trainer.examples, trainer.modality
    adapter = model.adapter
    sizes = adapter.stage_sizes() if evaluation.stage_counts else (1,)
    one, many = modality.noun
    paths = []
    with failures_as_warnings("picture of curves"):
        path = folder / "curves.png"
        records = read_metrics(folder / "metrics.jsonl")
        title = f"{examples.name}: training"
        highest = sum(sizes) / len(sizes)
        quality = (evaluation.measure, modality.measures[evaluation.measure].label)
        plots.save_curves(path, records, quality, codebook_size=highest, title=title, noun=many, captioned=captioned)
        paths.append(path)
    if evaluation.perplexity is None:
        return paths
    with failures_as_warnings("picture of usage"):
        path = folder / "usage.png"
        held_out = counted(len(examples.test), f"held-out {one}", f"held-out {many}")
        plots.save_usage(
            path,
            evaluation.stage_counts,
            perplexity=evaluation.perplexity,
            title=f"{examples.name}: codebook usage on {held_out}",
            captioned=captioned,
        )
        paths.append(path)
    with failures_as_warnings("picture of indices"):
        path = folder / "indices.png"
        rows = shown_rows(examples, _SHOWN_AS_INDICES)
        originals = to_float(examples.test[rows].to(trainer.device))
        restored, indices = reconstruct(model, originals)
        stages, vectors = adapter.stages(indices), _vectors_to_color(adapter)
        pictures = (modality.as_images(originals, trainer.config), modality.as_images(restored, trainer.config))
        texts: dict[str, Any] = {"title": f"{examples.name}: {many} as indices", "noun": one, "captioned": captioned}
        if stages[0].dim() == 2:
            plots.save_sequences(path, pictures[0], stages, pictures[1], vectors, **texts)
        else:
            grid = tuple(stages[0].shape[1:]) if stages[0].dim() == 4 else None
            plots.save_indices(path, pictures[0], [*map(flat_grid, stages)], pictures[1], vectors, grid=grid, **texts)
        paths.append(path)
    if adapter.leading:
        with failures_as_warnings("picture of scales"):
            rows = shown_rows(examples, _SHOWN_DECODED)
            indices = model.encode(to_float(examples.test[rows].to(trainer.device)))
            parts = {f"scale {scale}": indices[:, :end] for scale, end in enumerate(adapter.leading, 1)}
            lengths = ", ".join(str(math.prod(shape)) for shape in adapter.scales or ())
            caption = f"The scales have {lengths} indices for each {one}, and an encoder and a decoder of their own."
            title = f"{examples.name}: held-out {many}, decoded from each scale"
            path = folder / "scales.png"
            picture_decoded(path, model, trainer.config, examples, rows, parts, title=title, caption=caption)
            paths.append(path)
    return paths


@torch.no_grad()
def picture_decoded(
    path: StrPath,
    model: VQVAE,
    config: TrainConfig,
    examples: Examples,
    rows: Sequence[int],
    parts: Mapping[str, Tensor],
    *,
    title: str,
    caption: str,
) -> None:
    """Draw held-out examples as decoded from parts of their indices, and write them to be played.

    Args:
        path: file to write; files to play are in the folder `MEDIA` beside it.
        model, config: the model and its settings.
        examples: the data set.
        rows: the held-out examples to draw.
        parts: indices of these examples by what they are.
        title, caption: texts of the picture.
    """
    modality = modality_of(config.modality)
    signals = {"original": to_float(examples.test[rows])}
    signals |= {name: model.restore(indices).cpu() for name, indices in parts.items()}
    heard = {name.replace(" ", "-"): signal[:_HEARD] for name, signal in signals.items()}
    modality.write_media(Path(path).parent / MEDIA, Path(path).stem, heard, config)
    pictures = torch.stack([modality.as_images(signal, config) for signal in signals.values()], 1)
    names = [examples.test_names[row] for row in rows]
    plots.save_grid(path, list(pictures), names, list(signals), title=title, caption=caption, captioned=False)


def flat_grid(indices: Tensor) -> Tensor:
    """Return indices (N, *grid) as (N, h, w) to draw: the frames of a video side by side."""
    return indices if indices.dim() == 3 else indices.movedim(1, 2).flatten(2, 3)


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
        noun=modality_of(config.modality).noun[1],
        captioned=captioned,
    )
    return folder / "curves.png"
