"""Samples of a run's prior in files: a picture, an array of indices, or a folder of examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.data.examples import to_float
from fastvq.data.folder import read_files
from fastvq.errors import ConfigError, counted
from fastvq.extras import Progress
from fastvq.files import StrPath, check_new, whole, whole_folder
from fastvq.modalities import TrainConfig, modality_of
from fastvq.modalities.settings import check_range
from fastvq.models import VQVAE, Prior

from . import figures, plots
from .contrast import check_text, load_contrastive, similarity
from .load import conditions, label_number, load_model, load_prior_of, run_examples, text_row
from .outputs import check_ending, check_outside_data, is_folder, write_numbered
from .run_page import write_run_page
from .sample_pictures import beginnings, picture_completions, picture_prior_samples, picture_samples, sampled_with

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
    text: str | None = None,
    rerank: int | None = None,
    complete: bool = False,
    begin: StrPath | None = None,
    share: float | None = None,
    seed: int = 0,
    data: StrPath | None = None,
    **settings: Any,
) -> list[str]:
    """Sample from a run's prior and write files; return lines to print.

    Args:
        run: folder of a run with a prior.
        path: without it, samples, completions and neighbors are drawn for the page of the run, which is written again.
            Else its ending decides what is written. One of `figures.FORMATS`: a picture of samples, of each class if
            there are classes, beside real ones; or, with a count, a label or a text, of that many samples. One that the
            modality plays, such as .gif for video: that many samples in motion. ".npy": the indices alone,
            (count, *grid) int64. None, or a slash at its end: a new folder of files, with a subfolder for each class
            if there are classes.
        count: number of samples, `DEFAULT_COUNT` by default, and `GRID_COUNT` of one label or text in a picture.
        label: class of the samples, by number or by name, by default each class in turn.
        text: what the samples show, for a prior that was trained on captions.
        rerank: number of samples that are drawn for a text, of which the `count` most similar to it by the run's
            contrastive model are kept, the most similar first.
        complete: write a picture of completions of held-out examples instead.
        begin: a file whose beginning all samples keep: the upper part of an image, the first frames of a video, the
            first seconds of a sound. Without a label, they are sampled without a class.
        share: length of that beginning, as a share of the whole; by default half.
        seed: equal seeds give equal samples, and a smaller count gives the first samples of a larger one.
        data: where the data set of the run is now, see `run_examples`.
        settings: arguments of `Prior.sample`: temperature, top_k, top_p, guidance.

    Raises:
        CheckpointError: the run has no prior, or no contrastive model to rank samples.
        DataError: real examples or names of classes are needed, and the data are missing or others.
        ConfigError: an invalid argument or combination of arguments, by name.
        ValueError: an invalid argument of `Prior.sample`.
        FileExistsError: the folder exists.
    """
    check_range("seed", seed)
    if share is not None and begin is None:
        raise ConfigError("share: has no effect without begin")
    if path is None:
        given = {"count": count, "label": label, "text": text, "rerank": rerank, "complete": complete, "begin": begin}
        return _sample_for_page(run, given, seed=seed, data=data, **settings)
    if begin is not None and complete:
        raise ConfigError("begin: a picture of completions has held-out examples for beginnings")
    model, config = load_model(run)
    modality = modality_of(config.modality)
    one, many = modality.noun
    check_ending(path, (*figures.FORMATS, *sorted(modality.played - {*figures.FORMATS}), ".npy"), folder=many)
    check_outside_data(path, run, data)
    folder, array = is_folder(path), Path(path).suffix.lower() == ".npy"
    some = any(value is not None for value in (count, label, text, rerank, begin))
    if data is not None and (array or (not folder and some)):
        raise ConfigError(f"data: has no effect on {path}, which shows no held-out {many}")
    if begin is not None:
        settings["given"] = _beginning(model, config, begin, 0.5 if share is None else share)
    if not folder and not array:
        plays = Path(path).suffix.lower() in modality.played
        if some or (plays and not complete):
            if complete:
                raise ConfigError("complete: a picture of completions takes neither count nor label nor text")
            count = GRID_COUNT if count is None else count
            return _write_grid(run, path, _Request(count, label, text, rerank, seed, settings))
        prior = load_prior_of(run, model)
        examples = run_examples(run, data)
        picture = picture_completions if complete else picture_samples
        picture(path, prior, model, config, examples, seed=seed, **settings)
        return [f"picture: {path}"]
    if complete:
        raise ConfigError(f"complete: draws a picture, whose ending is {', '.join(figures.FORMATS)}, got {path}")
    if folder:
        check_new(Path(path))
    prior = load_prior_of(run, model)
    count = DEFAULT_COUNT if count is None else count
    if count < 1:
        raise ConfigError(f"count must be at least 1, got {count}")
    batches = _sample_batches(run, model, config, prior, _Request(count, label, text, rerank, seed, settings))
    if array:
        _write_array(path, (count, *prior.grid), batches)
        order = f", row n of class n mod {prior.classes}" if prior.classes and label is None and begin is None else ""
        return [f"{path}: indices of shape {(count, *prior.grid)}{order}"]
    names = None
    if prior.classes and (label is not None or begin is None):
        # Earlier priors do not name their classes.
        names = _folder_names(prior.class_names or run_examples(run, data).class_names or (), prior.classes)
    _write_examples(path, model, config, batches, names)
    return [f"{counted(count, one, many)}: {path}" + (", in a subfolder for each class" if names else "")]


@dataclass(frozen=True)
class _Request:
    """Request for samples; the fields are the arguments of `sample_run`."""

    count: int
    label: int | str | None
    text: str | None
    rerank: int | None
    seed: int
    settings: dict[str, Any]


def _write_grid(run: StrPath, path: StrPath, request: _Request) -> list[str]:
    """Draw a number of samples in rows and columns, or write a file in which the modality plays them."""
    count, settings = request.count, request.settings
    if not 1 <= count <= _MOST_IN_GRID:
        more = "; a folder or an .npy holds more" if count > _MOST_IN_GRID else ""
        raise ConfigError(f"count must be between 1 and {_MOST_IN_GRID} in a picture, got {count}{more}")
    model, config = load_model(run)
    prior, modality = load_prior_of(run, model), modality_of(config.modality)
    signals, names = [], []
    with torch.no_grad():
        for indices, labels in _sample_batches(run, model, config, prior, request):
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
            title=f"{Path(run).resolve().name}: {counted(count, 'sample')}{_following(request)}",
            caption="Indices sampled one after the other from the prior and decoded."
            + ("" if request.rerank is None else f" The most similar to the text of {request.rerank}, best first.")
            + (" All have the same beginning." if "given" in settings else "")
            + sampled_with({name: value for name, value in settings.items() if name != "given"}),
        )
    return [f"picture of {counted(count, 'sample')}{_following(request)}: {path}"]


def _beginning(model: VQVAE, config: TrainConfig, path: StrPath, share: float) -> Tensor:
    """Return the indices (1, *grid) of the first example in a file, with -1 behind its beginning."""
    stored, _ = read_files([path], modality_of(config.modality).reader, config.example_format)
    with torch.no_grad():
        return beginnings(model, config, model.encode(to_float(stored[:1])), share)[0]


def _sample_for_page(
    run: StrPath, given: dict[str, Any], *, seed: int, data: StrPath | None, **settings: Any
) -> list[str]:
    """Draw the samples of a run's page, and write it; of what is `given` the page takes nothing."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"{name}: the page of the run has its own samples: give an output")
    model, config = load_model(run)
    prior = load_prior_of(run, model)
    paths = picture_prior_samples(run, prior, model, config, run_examples(run, data), seed=seed, **settings)
    drawn = [f"pictures: {', '.join(map(str, paths))}"] if paths else []
    return [*drawn, f"page: {write_run_page(run)}"]


def _following(request: _Request) -> str:
    return "" if request.text is None else f" of {' '.join(request.text.split())!r}"


def _sample_batches(run: StrPath, model: VQVAE, config: TrainConfig, prior: Prior, request: _Request) -> _Batches:
    """Yield batches of samples as they are requested, after all arguments have been validated."""
    count, text, rerank = request.count, request.text, request.rerank
    check_text(text, label=request.label, rerank=rerank, count=count)
    label, row = label_number(prior, request.label), text_row(prior, text)
    if rerank is None or text is None:
        return _drawn(prior, count, label, row, request)
    ranking, modality = load_contrastive(run, model), modality_of(config.modality)
    found, similar = [], []
    for indices, _ in _drawn(prior, rerank, label, row, request):
        with torch.no_grad():
            similar.append(similarity(ranking, modality.as_images(model.restore(indices), config), text))
        found.append(indices)
    best = torch.cat(found)[torch.cat(similar).topk(count).indices]
    return ((part, None) for part in best.split(_BATCH))


def _drawn(prior: Prior, count: int, label: int | None, row: Tensor | None, request: _Request) -> _Batches:
    generator = torch.Generator().manual_seed(request.seed)
    settings, given = request.settings, request.settings.get("given")
    if given is not None:
        settings = settings | {"given": given.expand(_BATCH, *given.shape[1:])}
    with Progress(count, "sample") as bar:
        for first in range(0, count, _BATCH):
            labels = conditions(prior, first, _BATCH, label, row, in_turn=given is None)
            # The last batch is complete too, so that a sample depends on the seed and its number, not on the count.
            indices = prior.sample(_BATCH, labels, generator=generator, **settings)[: count - first]
            yield indices, labels[: len(indices)].tolist() if prior.classes and labels is not None else None
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
