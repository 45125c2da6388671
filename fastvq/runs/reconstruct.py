"""Reconstructions of images or other examples by a run's model, beside the originals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastvq.data.examples import to_float
from fastvq.data.folder import read_files
from fastvq.errors import counted
from fastvq.extras import tracked
from fastvq.files import StrPath
from fastvq.modalities import modality_of
from fastvq.training.evaluation import evaluate, reconstruct

from .load import load_model, run_examples
from .outputs import check_drawn, check_no_source, check_outside_data
from .pictures import draw_reconstructions, reconstructions_caption, shown_rows, spread

_SHOWN = 64


def reconstruct_held_out(run: StrPath, path: StrPath, *, data: StrPath | None = None) -> list[str]:
    """Draw held-out examples of a run's data set beside their reconstructions; return lines to print.

    Args:
        run: folder of the run.
        path: the picture to write; its ending is one of a picture, or of what the modality plays.
        data: where the data set of the run is now, see `run_examples`.
    """
    check_drawn(path)
    model, config = load_model(run)
    modality = modality_of(config.modality)
    check_drawn(path, modality)
    check_outside_data(path, run, data)
    examples = run_examples(run, data)
    one, many = modality.noun
    evaluation = evaluate(model, examples.test, modality.objective(config))
    quality = modality.measures[evaluation.measure].text(evaluation.value)
    rows = shown_rows(examples)
    draw_reconstructions(
        path,
        model,
        config,
        to_float(examples.test[rows]),
        [examples.test_names[row] for row in rows],
        title=f"{examples.name}: held-out {many}, {quality}",
        caption=reconstructions_caption(modality),
    )
    return [f"{counted(len(examples.test), f'held-out {one}', f'held-out {many}')}: {quality}"]


def reconstruct_files(
    run: StrPath, sources: Sequence[StrPath], path: StrPath, *, skip_unreadable: bool = False
) -> list[str]:
    """Draw the examples in files beside their reconstructions by a run's model; return a line to print for each.

    Args:
        run: folder of the run.
        sources: files, and folders, all of whose files are taken. Of more than 64 examples, 64 are drawn.
        path: the picture to write; its ending is one of a picture, or of what the modality plays.
        skip_unreadable: see `load_folder`.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        DataError: a file cannot be read.
        ConfigError: a picture of this ending can't be written, or it would replace one of the files.
    """
    check_drawn(path)
    model, config = load_model(run)
    modality = modality_of(config.modality)
    check_drawn(path, modality)
    check_no_source(path, sources)
    check_outside_data(path, run)
    one, many = modality.noun
    objective, measure = modality.objective(config), modality.measures[modality.objective(config).measure]
    stored, files = read_files(sources, modality.reader, config.example_format, skip_unreadable=skip_unreadable)
    errors: list[float] = []
    for part in tracked(stored.split(_SHOWN), len(stored), one, count=len):
        originals = to_float(part)
        errors += objective.errors(reconstruct(model, originals)[0], originals).tolist()
    rows = spread(len(files), _SHOWN)
    shown = f"{len(rows)} of {len(files)} {many}" if len(rows) < len(files) else counted(len(files), one, many)
    draw_reconstructions(
        path,
        model,
        config,
        to_float(stored[rows]),
        [_name(files[row], sources) for row in rows],
        title=f"{shown}, encoded and decoded by {os.fspath(run)}",
        caption=f"Below each {one}, as the model sees it, its reconstruction from indices. {many.capitalize()} unlike"
        " those that the model was trained on lose more.",
    )
    return [f"{file}: {measure.text(objective.value(error))}" for file, error in zip(files, errors, strict=True)]


def _name(file: str, sources: Sequence[StrPath]) -> str:
    """Return a file's path within the folder that it was found in, or its name."""
    for source in map(Path, sources):
        if source != Path(file) and Path(file).is_relative_to(source):
            return Path(file).relative_to(source).as_posix()
    return Path(file).name
