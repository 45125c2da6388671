"""Outputs whose path decides their format."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from fastvq.data.registry import check_outside
from fastvq.errors import CheckpointError, ConfigError
from fastvq.files import StrPath, lock_of
from fastvq.modalities import NAMES, Modality, TrainConfig, modality_of
from fastvq.training.checkpoint import load_latest

from . import figures


def is_folder(path: StrPath) -> bool:
    """Return whether a path stands for a folder to be written: it has no ending, or a slash at its end."""
    return os.fspath(path).endswith(("/", os.sep)) or not Path(path).suffix


def check_ending(path: StrPath, endings: Collection[str], *, folder: str = "", also: str = "") -> None:
    """Raise a ConfigError if the ending of an output names no format that can be written.

    Args:
        path: the output.
        endings: those of files that can be written.
        folder: what a folder would hold, if one may be written.
        also: what the message adds.
    """
    if folder and is_folder(path):
        return
    if is_folder(path) or Path(path).suffix.lower() not in endings:
        text = f" or be a new folder for {folder} (no ending, or / at its end)" if folder else ""
        raise ConfigError(f"out must end in {', '.join(endings)}{text}, got {os.fspath(path)}{also}")


def check_drawn(path: StrPath, modality: Modality | None = None) -> None:
    """Raise a ConfigError unless a picture, or what a modality plays, can be written to `path`.

    Args:
        path: the output.
        modality: of the run; by default any.
    """
    modalities = map(modality_of, NAMES) if modality is None else [modality]
    played = {ending for one in modalities for ending in one.played}
    check_ending(path, (*figures.FORMATS, *sorted(played - {*figures.FORMATS})))


def check_no_other_files(folder: StrPath) -> None:
    """Raise a CheckpointError if a new run would be written among files of somebody else, whose names it may take.

    Args:
        folder: of the run. Every training begins by locking it, which leaves a file there.
    """
    if lock_of(folder).exists() or not Path(folder).is_dir():
        return
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix.lower() in _OF_RUNS:
            raise CheckpointError(f"{path} was not written by a training in this folder: choose another folder")


_OF_RUNS = {".png", ".html", ".json", ".jsonl", ".toml", ".csv"}
"""The endings of files that a training writes."""


def check_no_source(path: StrPath, sources: Sequence[StrPath]) -> None:
    """Raise a ConfigError if an output is one of the files that it is made of, or in a folder of them."""
    output = Path(path).resolve()
    for source in sources:
        if output.exists() and (output == Path(source).resolve() or Path(source).resolve() in output.parents):
            raise ConfigError(f"out would replace {os.fspath(path)}, one of the files that it is made of: give another")


def check_outside_data(path: StrPath, run: StrPath, data: StrPath | None = None) -> None:
    """Raise a ConfigError if an output would become, or replace, one of the files that a run was trained on.

    Args:
        path: the output.
        run: folder of the run.
        data: where its data set is now, see `run_examples`.
    """
    config = load_latest(run, tensors=False).config
    if is_folder(path) or Path(path).suffix.lower() in modality_of(config.modality).reader.suffixes:
        for place in (config.data, data):
            if place is not None:
                check_outside(path, os.fspath(place), "out")


def write_numbered(
    folder: StrPath,
    modality: Modality,
    x: Tensor,
    config: TrainConfig,
    first: int,
    subfolders: Sequence[str] | None = None,
) -> None:
    """Write signals (N, C, *size) as files of the modality's usual ending, numbered from `first`.

    Args:
        folder: an existing folder.
        modality, config: the kind of the signals and the settings of their run.
        x: the signals.
        first: number of the first one.
        subfolders: for each signal, the folder in `folder` that it is written to.
    """
    for row, signal in enumerate(x):
        place = Path(folder) / subfolders[row] if subfolders else Path(folder)
        place.mkdir(exist_ok=True)
        modality.write(place / f"{first + row:06d}.{modality.usual_ending}", signal, config, modality.usual_ending)
