"""Samples of a run's prior in files: a picture, an array of indices, or a folder of examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.errors import ConfigError, counted
from fastvq.extras import Progress
from fastvq.files import StrPath, check_new, whole, whole_folder
from fastvq.modalities import TrainConfig, modality_of
from fastvq.models import VQVAE, Prior
from fastvq.settings import check_range

from . import plots
from .load import label_number, load_model, load_prior_of, run_examples
from .outputs import check_ending, check_outside_data, is_folder, write_numbered
from .run_page import write_run_page
from .sample_pictures import picture_completions, picture_prior_samples, picture_samples, sampled_with

DEFAULT_COUNT, GRID_COUNT = 100, 16
_MOST_IN_GRID = 1024
_BATCH = 100
_Batches = Iterator[tuple[Tensor, list[int] | None]]  # indices (B, *grid) and their labels


def sample_run(
    run: StrPath,
    path: StrPath | None = None,
    *,
    count: int | None = None,
    label: int | str | None = None,
    complete: bool = False,
    seed: int = 0,
    data: StrPath | None = None,
    **settings: Any,
) -> list[str]:
    """Sample from a run's prior and write files; return lines to print.

    Args:
        run: folder of a run with a prior.
        path: without it, samples, completions and neighbors are drawn for the page of the run, which is written again.
            Else its ending decides what is written. One of `plots.FORMATS`: a picture of samples, of each class if
            there are classes, beside real ones; or, with a count or a label, of that many samples. One that the
            modality plays, such as .gif for video: that many samples in motion. ".npy": the indices alone,
            (count, *grid) int64. None, or a slash at its end: a new folder of files, with a subfolder for each class
            if there are classes.
        count: number of samples, `DEFAULT_COUNT` by default, and `GRID_COUNT` of one label in a picture.
        label: class of the samples, by number or by name, by default each class in turn.
        complete: write a picture of completions of held-out examples instead.
        seed: equal seeds give equal samples, and a smaller count gives the first samples of a larger one.
        data: where the data set of the run is now, see `run_examples`.
        settings: arguments of `Prior.sample`: temperature, top_k, top_p, guidance.

    Raises:
        CheckpointError: the run has no prior.
        DataError: real examples or names of classes are needed, and the data are missing or others.
        ConfigError: an invalid argument or combination of arguments, by name.
        ValueError: an invalid argument of `Prior.sample`.
        FileExistsError: the folder exists.
    """
    check_range("seed", seed)
    if path is None:
        return _sample_for_page(run, count=count, label=label, complete=complete, seed=seed, data=data, **settings)
    model, config = load_model(run)
    modality = modality_of(config.modality)
    one, many = modality.noun
    check_ending(path, (*plots.FORMATS, *sorted(modality.played - {*plots.FORMATS}), ".npy"), folder=many)
    check_outside_data(path, run, data)
    folder, array = is_folder(path), Path(path).suffix.lower() == ".npy"
    if data is not None and (array or (not folder and (count is not None or label is not None))):
        raise ConfigError(f"data: has no effect on {path}, which shows no held-out {many}")
    if not folder and not array:
        plays = Path(path).suffix.lower() in modality.played
        if count is not None or label is not None or (plays and not complete):
            if complete:
                raise ConfigError("complete: a picture of completions takes neither count nor label")
            return _write_grid(run, path, GRID_COUNT if count is None else count, label, seed, settings)
        prior = load_prior_of(run, model)
        examples = run_examples(run, data)
        picture = picture_completions if complete else picture_samples
        picture(path, prior, model, config, examples, seed=seed, **settings)
        return [f"picture: {path}"]
    if complete:
        raise ConfigError(f"complete: draws a picture, whose ending is {', '.join(plots.FORMATS)}, got {path}")
    if folder:
        check_new(Path(path))
    prior = load_prior_of(run, model)
    count = DEFAULT_COUNT if count is None else count
    if count < 1:
        raise ConfigError(f"count must be at least 1, got {count}")
    number = label_number(prior, label)
    batches = _sample_batches(prior, count, number, seed, settings)
    if array:
        _write_array(path, (count, *prior.grid), batches)
        order = f", row n of class n mod {prior.classes}" if prior.classes and label is None else ""
        return [f"{path}: indices of shape {(count, *prior.grid)}{order}"]
    names = None
    if prior.classes:
        # Earlier priors do not name their classes.
        names = _folder_names(prior.class_names or run_examples(run, data).class_names or (), prior.classes)
    _write_examples(path, model, config, batches, names)
    return [f"{counted(count, one, many)}: {path}" + (", in a subfolder for each class" if names else "")]


def _write_grid(
    run: StrPath, path: StrPath, count: int, label: int | str | None, seed: int, settings: dict[str, Any]
) -> list[str]:
    """Draw a number of samples in rows and columns, or write a file in which the modality plays them."""
    if not 1 <= count <= _MOST_IN_GRID:
        more = "; a folder or an .npy holds more" if count > _MOST_IN_GRID else ""
        raise ConfigError(f"count must be between 1 and {_MOST_IN_GRID} in a picture, got {count}{more}")
    model, config = load_model(run)
    prior, modality = load_prior_of(run, model), modality_of(config.modality)
    number = label_number(prior, label)
    signals, names = [], []
    with torch.no_grad():
        for indices, labels in _sample_batches(prior, count, number, seed, settings):
            signals.append(model.restore(indices))
            names += [prior.class_names[row] if prior.class_names else f"class {row}" for row in labels or []]
    sampled = torch.cat(signals)
    if Path(path).suffix.lower() in modality.played:
        with whole(path) as file:
            modality.play(file, {"sampled": sampled}, config, Path(path).suffix)
    else:
        plots.save_samples(
            path,
            modality.as_images(sampled, config),
            names,
            title=f"{Path(run).resolve().name}: {counted(count, 'sample')}",
            caption="Indices sampled one after the other from the prior and decoded." + sampled_with(settings),
        )
    return [f"picture of {counted(count, 'sample')}: {path}"]


def _sample_for_page(run: StrPath, *, seed: int, data: StrPath | None, **arguments: Any) -> list[str]:
    """Draw the samples of a run's page, and write it."""
    for name in ("count", "label", "complete"):
        value = arguments.pop(name)
        if value is not None and value is not False:
            raise ConfigError(f"{name}: the page of the run has its own samples: give an output")
    model, config = load_model(run)
    prior = load_prior_of(run, model)
    paths = picture_prior_samples(run, prior, model, config, run_examples(run, data), seed=seed, **arguments)
    drawn = [f"pictures: {', '.join(map(str, paths))}"] if paths else []
    return [*drawn, f"page: {write_run_page(run)}"]


def _sample_batches(prior: Prior, count: int, label: int | None, seed: int, settings: dict[str, Any]) -> _Batches:
    generator = torch.Generator().manual_seed(seed)
    with Progress(count, "sample") as bar:
        for first in range(0, count, _BATCH):
            labels = None
            if prior.classes:
                turn = torch.arange(first, first + _BATCH) % prior.classes
                labels = turn if label is None else torch.full_like(turn, label)
            # The last batch is complete too, so that a sample depends on the seed and its number, not on the count.
            indices = prior.sample(_BATCH, labels, generator=generator, **settings)[: count - first]
            yield indices, None if labels is None else labels[: len(indices)].tolist()
            bar.update(len(indices))


def _write_array(path: StrPath, shape: tuple[int, ...], batches: _Batches) -> None:
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    with whole(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for indices, _ in batches:
            file.write(indices.numpy().astype("<i8").tobytes())


@torch.no_grad()
def _write_examples(
    folder: StrPath, model: VQVAE, config: TrainConfig, batches: _Batches, names: list[str] | None
) -> None:
    number, modality = 0, modality_of(config.modality)
    with whole_folder(folder) as partial:
        for indices, labels in batches:
            subfolders = [names[label] for label in labels] if names and labels else None
            write_numbered(partial, modality, model.restore(indices), config, number, subfolders)
            number += len(indices)


def _folder_names(names: Sequence[str], classes: int) -> list[str]:
    """Return a name for each class that sorts by label and is valid in every file system."""
    digits = len(str(classes - 1))
    names = [*names, *(f"class {label}" for label in range(len(names), classes))]
    return [f"{label:0{digits}d}-" + re.sub(r"[^\w.]+", "-", name) for label, name in enumerate(names)]
