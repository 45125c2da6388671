"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write to the path that this yields: it takes the place of `path` once the block has ended without an error.

    Whoever reads meanwhile, or after a kill, finds the file as it was before. Missing folders are made.
    """
    if not path.name or path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: a file is to be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write into the folder that this yields: it becomes `folder`, which must be new, once the block has ended without
    an error. Missing folders above it are made.

    Raises:
        FileExistsError: see `check_new`.
    """
    check_new(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Raises a FileExistsError if there is something by the name of a folder that is about to be written."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder")
