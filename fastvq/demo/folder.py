"""The folder of a demo: who may write there, and what becomes of an earlier demo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastvq.errors import CheckpointError, ConfigError
from fastvq.files import StrPath, delete_folder, exclusive, make_folder
from fastvq.runs.contrast import CONTRASTIVE_FOLDER
from fastvq.runs.pictures import MEDIA
from fastvq.runs.train_prior import delete_prior
from fastvq.training.checkpoint import checkpoint_folders
from fastvq.training.loop import delete_run

METRICS = "metrics.json"
"""File with which a demo is finished."""
_MARKER = ".demo"
_EARLIER = "earlier"
"""Subfolder that keeps a finished demo until the one that replaces it is finished."""
LADDER = ("autoencoder", "vae", "gumbel")
"""Subfolders with the runs of the demo of several models."""
JUDGE = "judge"
"""Subfolder with the contrastive model of the demo of text that judges samples."""
_RUNS = ("ceiling", *LADDER, CONTRASTIVE_FOLDER, JUDGE)
_PICTURES = (
    *("reconstructions", "curves", "usage", "indices", "samples", "completions", "neighbors"),
    *("subspace", "latents", "divergence", "interpolations"),
    *("learned", "held-out", "captions", "combinations", "stages", "rates"),
)
_FILES = (
    *("index.html", "images.fvq", "clips.fvq", "config.toml", "evaluation.json", "samples.json", "metrics.jsonl"),
    *(f"{name}.png" for name in _PICTURES),
    METRICS,
)
_FOLDERS = ("checkpoints", "tensorboard", *_RUNS, "prior", MEDIA)


def check_request(*, resume: bool, overwrite: bool) -> None:
    """Raise a ConfigError if a demo is to be both continued and replaced."""
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other")


@contextlib.contextmanager
def demo_folder(folder: StrPath, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Let a demo write to a folder, alone; when it is finished, delete the one that it replaces.

    Args:
        folder: the folder.
        resume: continue an interrupted demo.
        overwrite: replace the demo that is there. A finished one moves to `earlier/` and is deleted when the other one
            has written `METRICS`.

    Raises:
        CheckpointError: the folder holds a run that is not a demo, or a demo, and neither `resume` nor `overwrite` is
            given; another process is writing there.
    """
    folder = Path(folder)
    with exclusive(folder):
        if checkpoint_folders(folder) and not (folder / _MARKER).exists():
            raise CheckpointError(f"{folder} holds a run that is not a demo: choose another folder")
        if checkpoint_folders(folder) and not resume and not overwrite:
            kind = "a finished" if (folder / METRICS).exists() else "an unfinished"
            raise CheckpointError(
                f"{folder} holds {kind} demo: resume it (--resume), replace it (--overwrite), or choose another folder"
            )
        if overwrite:
            _set_aside(folder)
        (folder / _MARKER).touch()
        yield
        if (folder / METRICS).exists():
            _delete(folder / _EARLIER)


def _set_aside(folder: Path) -> None:
    """Move a finished demo to its subfolder `earlier`, or delete an unfinished one."""
    if not (folder / METRICS).exists():
        _delete(folder)
        return
    earlier = folder / _EARLIER
    if (earlier / METRICS).exists():
        _delete(earlier)
    make_folder(earlier)
    # METRICS comes last: until then, an interrupted move is continued.
    for name in (*_FOLDERS, *_FILES):
        if (folder / name).exists():
            os.rename(folder / name, earlier / name)


def _delete(folder: Path) -> None:
    """Delete what a demo has written to a folder, and the folder if nothing else is in it."""
    delete_run(folder)
    for run in _RUNS:
        delete_run(folder / run)
    delete_prior(folder)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / "prior" / "curves.png").unlink(missing_ok=True)
    if (folder / MEDIA).is_dir():
        delete_folder(folder / MEDIA)
    runs = [folder / run for run in _RUNS]
    for part in (*runs, folder / "prior" / "successor", folder / "prior", folder):
        for name in ("tensorboard", "checkpoints"):
            if (part / name).is_dir() and (name == "tensorboard" or not any((part / name).iterdir())):
                delete_folder(part / name)
        if part != folder or folder.name == _EARLIER:
            (part / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                part.rmdir()
