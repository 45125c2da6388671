"""Decoded images in a file of the user's cache, which is mapped: a data set may be larger than memory.

A cache entry is a folder named after what its content depends on: the files by path, size and time of change, not where
they lie, and the format. It holds `pixels.npy`, first the images to learn from and then those held out, and
`items.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastvq.extras import tracked
from fastvq.files import delete_folder, whole_folder, write_whole

from .image_format import ImageFormat
from .images import digest_of
from .source import Item, Source
from .split import split_items

_VERSION = 1
_MANY, _MOST = 256, 8
"""Images from which on several processes decode, and the most of these."""
_COPIED = 1 << 22
_PIXELS, _ITEMS = "pixels.npy", "items.json"


@dataclass(frozen=True)
class Decoded:
    """Decoded images.

    Attributes:
        pixels: (N, C, H, W), uint8, those to learn from first.
        items: their names, classes and captions, in the same order.
        train: number of images to learn from.
        failures: why a file cannot be read, by its name.
        digest: SHA-256 of the pixels, see `Images.fingerprint`.
    """

    pixels: Tensor
    items: list[Item]
    train: int
    failures: dict[str, str]
    digest: str


def cache_folder() -> Path:
    """Return the folder of the cache: `$XDG_CACHE_HOME/fastvq/decoded`, by default `~/.cache/fastvq/decoded`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvq" / "decoded"


def decode(
    source: Source, format: ImageFormat, test_fraction: float, *, workers: int | None = None, progress: bool = False
) -> Decoded:
    """Return the images of a source from the cache; decode them into it where they are not there yet.

    An entry whose pixels are not those that were written is written again. Where the cache cannot be written, the
    images are held in memory, with a warning.

    Args:
        source: the images.
        format: size and color.
        test_fraction: share of the images to hold out.
        workers: processes that decode, see `load_folder`.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the source cannot be read at all.
    """
    described = json.dumps([_VERSION, source.stamp(), dataclasses.asdict(format), test_fraction])
    entry = cache_folder() / hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()[:32]
    found = _load(entry, format)
    if found is None:
        try:
            if entry.exists():
                delete_folder(entry)
            with contextlib.suppress(FileExistsError), whole_folder(entry) as folder:  # another process may be faster
                _decode_into(folder, source, format, test_fraction, workers, progress=progress)
            found = _load(entry, format)
        except OSError as error:
            reason = f"{cache_folder()}: {error.strerror or error}: decoded images are held in memory"
            warnings.warn(reason, RuntimeWarning, stacklevel=3)
    return found or _decode_in_memory(source, format, test_fraction, workers, progress=progress)


def _results(
    source: Source, format: ImageFormat, count: int, workers: int | None, *, progress: bool
) -> Iterator[tuple[str, Tensor | str]]:
    if workers is None:
        workers = min(_MOST, os.cpu_count() or 1) if count >= _MANY else 0
    yield from tracked(source.read(format, workers), count, "image", shown=progress)


def _decode_in_memory(
    source: Source, format: ImageFormat, test_fraction: float, workers: int | None, *, progress: bool
) -> Decoded:
    items = source.items()
    results = dict(_results(source, format, len(items), workers, progress=progress))
    failures = {name: result for name, result in results.items() if isinstance(result, str)}
    train, test = split_items([item for item in items if item.name not in failures], test_fraction)
    pixels = torch.empty(len(train) + len(test), *format.shape, dtype=torch.uint8)
    for row, item in enumerate([*train, *test]):
        pixels[row] = results[item.name]  # type: ignore[assignment]
    digest = digest_of(pixels[: len(train)], pixels[len(train) :])
    return Decoded(pixels, [*train, *test], len(train), failures, digest)


def _decode_into(
    folder: Path, source: Source, format: ImageFormat, test_fraction: float, workers: int | None, *, progress: bool
) -> None:
    """Write the two files of an entry; each image goes to its place when it arrives, none is held."""
    items = source.items()
    train, test = split_items(items, test_fraction)
    rows = {item.name: row for row, item in enumerate([*train, *test])}
    failures: dict[str, str] = {}
    path = folder / _PIXELS
    with path.open("wb") as file:
        start = _write_header(file, (len(rows), *format.shape))
        for name, result in _results(source, format, len(items), workers, progress=progress):
            if isinstance(result, str):
                failures[name] = result
            else:
                file.seek(start + rows[name] * result.numel())
                file.write(result.numpy().tobytes())
    if failures:
        train, test = split_items([item for item in items if item.name not in failures], test_fraction)
        _select_rows(path, start, format, [rows[item.name] for item in (*train, *test)])
    kept = [*train, *test]
    pixels = _mapped(path, len(kept), format)
    digest = digest_of(pixels[: len(train)], pixels[len(train) :])
    described = {
        "items": [dataclasses.astuple(item) for item in kept],
        "train": len(train),
        "failures": failures,
        "digest": digest,
    }
    write_whole(folder / _ITEMS, json.dumps(described | {"sha256": _digest(described)}))


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _select_rows(path: Path, start: int, format: ImageFormat, rows: Sequence[int]) -> None:
    """Keep these rows of a file of pixels, in this order."""
    size = int(np.prod(format.shape))
    selected = path.with_suffix(".selected")
    with path.open("rb") as old, selected.open("wb") as new:
        _write_header(new, (len(rows), *format.shape))
        for row in rows:
            old.seek(start + row * size)
            new.write(old.read(size))
    os.replace(selected, path)


def _mapped(path: Path, count: int, format: ImageFormat) -> Tensor:
    """Return a file's pixels; mapped copy-on-write, because torch warns about memory that is not writable.

    Raises:
        ValueError: the file has another shape.
    """
    if not count:  # an empty file can't be mapped
        return torch.empty(0, *format.shape, dtype=torch.uint8)
    pixels = np.load(path, mmap_mode="c", allow_pickle=False)
    if pixels.shape != (count, *format.shape) or pixels.dtype != np.uint8:
        raise ValueError(f"{path} holds {pixels.dtype} of shape {pixels.shape}")
    return torch.from_numpy(pixels)


def _digest(described: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _load(entry: Path, format: ImageFormat) -> Decoded | None:
    """Return an entry of the cache, or None where there is none or it is damaged."""
    try:
        described = json.loads((entry / _ITEMS).read_bytes())
        if described.pop("sha256") != _digest(described):
            return None
        items, train = [Item(*fields) for fields in described["items"]], described["train"]
        pixels = _mapped(entry / _PIXELS, len(items), format)
        if digest_of(pixels[:train], pixels[train:]) != described["digest"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Decoded(pixels, items, train, described["failures"], described["digest"])


def cache_size() -> tuple[int, int]:
    """Return the number of entries in the cache, and their bytes."""
    entries = [path for path in cache_folder().glob("*") if (path / _ITEMS).is_file()]
    return len(entries), sum(file.stat().st_size for entry in entries for file in entry.iterdir())


def clear_cache() -> None:
    """Delete all entries of the cache; processes that have mapped one keep its pixels."""
    for path in cache_folder().glob("*"):
        if (path / _ITEMS).is_file():
            delete_folder(path)
