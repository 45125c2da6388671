"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
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
