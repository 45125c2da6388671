"""Samples of a run's prior in files: as a picture, as codes in an array, or as images in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.data import Images
from fastvq.data.folder import write_images
from fastvq.errors import ConfigError
from fastvq.extras import require
from fastvq.files import check_new, whole, whole_folder
from fastvq.models import VQVAE, Prior
from fastvq.training.build import load_images
from fastvq.training.config import check_range
from fastvq.training.prior import load_prior

from .load import load_model
from .sample_pictures import class_name, picture_completions, picture_samples

COUNT = 100
_BATCH = 100
_Batches = Iterator[tuple[Tensor, list[int] | None]]  # codes (B, *grid) and their labels


def sample_run(
    run: Path,
    path: Path,
    *,
    count: int | None = None,
    label: int | None = None,
    complete: bool = False,
    seed: int = 0,
    **settings: Any,
) -> list[str]:
    """Draw samples of a run's prior to files; return lines to print.

    Args:
        run: folder of a run with a prior.
        path: what is written follows from how it ends. ".png": a picture of samples of each class beside real images.
            ".npy": the codes alone, (count, *grid) int64. Without a suffix: a new folder of PNG files, in a subfolder
            for each class where there are classes.
        count: how many samples, `COUNT` by default. label: of which class, by default of all in turn. A picture has its
            own.
        complete: a picture of completions of held-out images instead.
        seed: the same one draws the same samples, and fewer of them are the first of more.
        settings: of `Prior.sample`: temperature, top_k, top_p, guidance.

    Raises:
        CheckpointError: the run has no prior. ConfigError: a combination that can't be, by name. ValueError: a setting
            of `Prior.sample` that can't be. FileExistsError: the folder is there.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".npy", ""):
        raise ConfigError(f"out must end in .png (a picture), .npy (codes) or without a suffix (a folder), got {path}")
    check_range("seed", seed)
    if suffix == ".png":
        for name, value in (("count", count), ("label", label)):
            if value is not None:
                raise ConfigError(f"{name}: a picture shows some samples of each class; let out be a folder or an .npy")
        prior, model = load_prior(run)
        picture = picture_completions if complete else picture_samples
        picture(path, prior, model, load_images(load_model(run)[1]), seed=seed, **settings)
        return [f"picture: {path}"]
    if complete:
        raise ConfigError(f"complete: draws a picture, for which out ends in .png, got {path}")
    if not suffix:
        check_new(path)
    prior, model = load_prior(run)
    count = COUNT if count is None else count
    _check(prior, count, label)
    batches = _drawn(prior, count, label, seed, settings)
    if suffix:
        _write_codes(path, (count, *prior.grid), batches)
        order = f", row n of class n mod {prior.classes}" if prior.classes and label is None else ""
        return [f"{path}: codes of shape {(count, *prior.grid)}{order}"]
    names = _folder_names(load_images(load_model(run)[1]), prior.classes) if prior.classes else None
    _write_images(path, model, batches, names)
    return [f"{count} images: {path}" + (", in a subfolder for each class" if names else "")]


def _check(prior: Prior, count: int, label: int | None) -> None:
    if count < 1:
        raise ConfigError(f"count must be at least 1, got {count}")
    if label is not None and not prior.classes:
        raise ConfigError(f"label: this prior was learned without classes, got {label}")
    if label is not None and not 0 <= label < prior.classes:
        raise ConfigError(f"label must be between 0 and {prior.classes - 1}, got {label}")


def _drawn(prior: Prior, count: int, label: int | None, seed: int, settings: dict[str, Any]) -> _Batches:
    generator = torch.Generator().manual_seed(seed)
    with require("tqdm").tqdm(total=count, unit="sample", disable=count <= _BATCH, dynamic_ncols=True) as bar:
        for first in range(0, count, _BATCH):
            labels = None
            if prior.classes:
                turn = torch.arange(first, first + _BATCH) % prior.classes
                labels = turn if label is None else torch.full_like(turn, label)
            # The last batch is drawn whole too, so that a sample depends on the seed and its number, not on the count.
            codes = prior.sample(_BATCH, labels, generator=generator, **settings)[: count - first]
            yield codes, None if labels is None else labels[: len(codes)].tolist()
            bar.update(len(codes))


def _write_codes(path: Path, shape: tuple[int, ...], batches: _Batches) -> None:
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    with whole(path) as partial, partial.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for codes, _ in batches:
            stream.write(codes.numpy().astype("<i8").tobytes())


@torch.no_grad()
def _write_images(folder: Path, model: VQVAE, batches: _Batches, names: list[str] | None) -> None:
    number = 0
    with whole_folder(folder) as partial:
        for codes, labels in batches:
            subfolders = [names[label] for label in labels] if names and labels else None
            write_images(partial, model.decode(codes).clamp(0, 1), number, subfolders)
            number += len(codes)


def _folder_names(images: Images, classes: int) -> list[str]:
    """For each class a name that sorts by label, of characters that any file system takes."""
    digits = len(str(classes - 1))
    return [f"{label:0{digits}d}-" + re.sub(r"[^\w.]+", "-", class_name(images, label)) for label in range(classes)]
