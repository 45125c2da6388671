"""Reconstructions of images by a run's model, beside the originals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastvq.data.folder import read_images
from fastvq.data.images import to_float
from fastvq.errors import counted
from fastvq.extras import tracked
from fastvq.files import StrPath
from fastvq.training.evaluation import evaluate, psnr_db, reconstruct

from . import plots
from .load import load_model, run_images
from .outputs import check_no_source, check_outside_data
from .pictures import RECONSTRUCTIONS_CAPTION, shown_rows, spread

_SHOWN = 64


def reconstruct_held_out(run: StrPath, path: StrPath, *, data: StrPath | None = None) -> list[str]:
    """Draw held-out images of a run's data set beside their reconstructions; return lines to print.

    Args:
        run: folder of the run.
        path: the picture to write; its ending is in `plots.FORMATS`.
        data: where the data set of the run is now, see `run_images`.
    """
    plots.check_format(path)
    check_outside_data(path, run, data)
    model, _ = load_model(run)
    images = run_images(run, data)
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
    return [f"{counted(len(images.test), 'held-out image')}: {evaluation.psnr_db:.2f} dB"]


def reconstruct_files(
    run: StrPath, sources: Sequence[StrPath], path: StrPath, *, skip_unreadable: bool = False
) -> list[str]:
    """Draw image files beside their reconstructions by a run's model; return a line to print for each.

    Args:
        run: folder of the run.
        sources: image files, and folders, all of whose images are taken. Of more than 64, 64 are drawn.
        path: the picture to write; its ending is in `plots.FORMATS`.
        skip_unreadable: see `load_folder`.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        DataError: a file is not a readable image.
        ConfigError: a picture of this ending can't be written, or it would replace one of the images.
    """
    plots.check_format(path)
    check_no_source(path, sources)
    check_outside_data(path, run)
    model, config = load_model(run)
    pixels, files = read_images(sources, config.image_format(), skip_unreadable=skip_unreadable)
    errors: list[float] = []
    for part in tracked(pixels.split(_SHOWN), len(pixels), "image", count=len):
        originals = to_float(part)
        errors += (reconstruct(model, originals)[0] - originals).square().flatten(1).mean(1).tolist()
    rows = spread(len(files), _SHOWN)
    originals = to_float(pixels[rows])
    shown = f"{len(rows)} of {len(files)} images" if len(rows) < len(files) else counted(len(files), "image")
    plots.save_reconstructions(
        path,
        originals,
        reconstruct(model, originals)[0],
        [_name(files[row], sources) for row in rows],
        title=f"{shown}, encoded and decoded by {os.fspath(run)}",
        caption="Below each image, as the model sees it, its reconstruction from indices. Images unlike those that the"
        " model was trained on lose more.",
    )
    return [f"{file}: {psnr_db(error):.2f} dB" for file, error in zip(files, errors, strict=True)]


def _name(file: str, sources: Sequence[StrPath]) -> str:
    """Return a file's path within the folder that it was found in, or its name."""
    for source in map(Path, sources):
        if source != Path(file) and Path(file).is_relative_to(source):
            return Path(file).relative_to(source).as_posix()
    return Path(file).name
