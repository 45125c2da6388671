"""Decoded examples in a file of the user's cache, which is mapped: a data set may be larger than memory.

A cache entry is a folder named after what its content depends on: the files by path, size and time of change, not where
they lie, and the format. It holds `values.npy`, first the examples to learn from and then those held out, and
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

from fastvq.errors import DataError
from fastvq.extras import tracked
from fastvq.files import delete_folder, whole_folder, write_whole

from .examples import digest_of
from .reader import Format
from .source import Item, Source
from .split import split_items

_VERSION = 2
_MANY, _MOST = 256, 8
"""Files from which on several processes decode, and the most of these."""
_VALUES, _ITEMS = "values.npy", "items.json"


@dataclass(frozen=True)
class Decoded:
    """Decoded examples.

    Attributes:
        values: (N, C, *size) in the stored dtype, those to learn from first.
        items: the files with their names, classes, captions and numbers of examples, in the same order.
        train: number of files to learn from.
        failures: why a file cannot be read, by its name.
        digest: SHA-256 of the values, see `Examples.fingerprint`.
    """

    values: Tensor
    items: list[Item]
    train: int
    failures: dict[str, str]
    digest: str


def cache_folder() -> Path:
    """Return the folder of the cache: `$XDG_CACHE_HOME/fastvq/decoded`, by default `~/.cache/fastvq/decoded`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvq" / "decoded"


def decode(
    source: Source, format: Format, test_fraction: float, *, workers: int | None = None, progress: bool = False
) -> Decoded:
    """Return the examples of a source from the cache; decode them into it where they are not there yet.

    An entry whose values are not those that were written is written again. Where the cache cannot be written, the
    examples are held in memory, with a warning.

    Args:
        source: the files.
        format: the form that examples are brought to.
        test_fraction: share of the files to hold out.
        workers: processes that decode, see `load_folder`.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the source cannot be read at all.
    """
    described = json.dumps([_VERSION, source.stamp(), type(format).__name__, dataclasses.asdict(format), test_fraction])
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
            reason = f"{cache_folder()}: {error.strerror or error}: decoded examples are held in memory"
            warnings.warn(reason, RuntimeWarning, stacklevel=3)
    return found or _decode_in_memory(source, format, test_fraction, workers, progress=progress)


def _results(
    source: Source, format: Format, count: int, workers: int | None, *, progress: bool
) -> Iterator[tuple[str, Tensor | str]]:
    if workers is None:
        workers = min(_MOST, os.cpu_count() or 1) if count >= _MANY else 0
    yield from tracked(source.read(format, workers), count, "file", shown=progress)


def _split(
    items: Sequence[Item], counts: dict[str, int], failures: dict[str, str], test_fraction: float
) -> tuple[list[Item], list[Item]]:
    """Return the readable files to learn from and to hold out, with the numbers of their examples."""
    readable = [dataclasses.replace(item, examples=counts[item.name]) for item in items if item.name not in failures]
    return split_items(readable, test_fraction)


def _decode_in_memory(
    source: Source, format: Format, test_fraction: float, workers: int | None, *, progress: bool
) -> Decoded:
    items = source.items()
    results = dict(_results(source, format, len(items), workers, progress=progress))
    failures = {name: result for name, result in results.items() if isinstance(result, str)}
    read = {name: result for name, result in results.items() if isinstance(result, Tensor)}
    train, test = _split(items, {name: len(own) for name, own in read.items()}, failures, test_fraction)
    kept = [*train, *test]
    values = torch.cat([read[item.name] for item in kept]) if kept else torch.empty(0, *format.shape)
    boundary = sum(item.examples for item in train)
    return Decoded(values, kept, len(train), failures, digest_of(values[:boundary], values[boundary:]))


def _decode_into(
    folder: Path, source: Source, format: Format, test_fraction: float, workers: int | None, *, progress: bool
) -> None:
    """Write the two files of an entry; examples go to disk as they arrive, and to their places afterwards."""
    items = source.items()
    failures: dict[str, str] = {}
    counts: dict[str, int] = {}
    firsts: dict[str, int] = {}
    written, dtype = 0, np.dtype(np.uint8)
    arrived, path = folder / f"{_VALUES}.arrived", folder / _VALUES
    with arrived.open("wb") as file:
        for name, result in _results(source, format, len(items), workers, progress=progress):
            if isinstance(result, str):
                failures[name] = result
                continue
            if result.shape[1:] != format.shape:
                raise DataError(f"{name}: read as {tuple(result.shape)}, but its format has {format.shape}")
            firsts[name], counts[name], dtype = written, len(result), result.numpy().dtype
            file.write(result.contiguous().numpy().data)
            written += len(result)
    train, test = _split(items, counts, failures, test_fraction)
    kept = [*train, *test]
    size = int(np.prod(format.shape)) * dtype.itemsize
    total = sum(item.examples for item in kept)
    with arrived.open("rb") as old, path.open("wb") as new:
        _write_header(new, (total, *format.shape), dtype)
        for item in kept:
            old.seek(firsts[item.name] * size)
            for _ in range(item.examples):
                new.write(old.read(size))
    arrived.unlink()
    values = _mapped(path, total, format)
    boundary = sum(item.examples for item in train)
    described = {
        "items": [dataclasses.astuple(item) for item in kept],
        "train": len(train),
        "failures": failures,
        "digest": digest_of(values[:boundary], values[boundary:]),
    }
    write_whole(folder / _ITEMS, json.dumps(described | {"sha256": _digest(described)}))


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _mapped(path: Path, count: int, format: Format) -> Tensor:
    """Return a file's values; mapped copy-on-write, because torch warns about memory that is not writable.

    Raises:
        ValueError: the file has another shape, or a dtype that no example is stored in.
    """
    if not count:  # an empty file can't be mapped
        return torch.empty(0, *format.shape, dtype=torch.uint8)
    values = np.load(path, mmap_mode="c", allow_pickle=False)
    if values.shape != (count, *format.shape) or values.dtype not in (np.uint8, np.int16):
        raise ValueError(f"{path} holds {values.dtype} of shape {values.shape}")
    return torch.from_numpy(values)


def _digest(described: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _load(entry: Path, format: Format) -> Decoded | None:
    """Return an entry of the cache, or None where there is none or it is damaged."""
    try:
        described = json.loads((entry / _ITEMS).read_bytes())
        if described.pop("sha256") != _digest(described):
            return None
        items, train = [Item(*fields) for fields in described["items"]], described["train"]
        values = _mapped(entry / _VALUES, sum(item.examples for item in items), format)
        boundary = sum(item.examples for item in items[:train])
        if digest_of(values[:boundary], values[boundary:]) != described["digest"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Decoded(values, items, train, described["failures"], described["digest"])


def cache_size() -> tuple[int, int]:
    """Return the number of entries in the cache, and their bytes."""
    entries = [path for path in cache_folder().glob("*") if (path / _ITEMS).is_file()]
    return len(entries), sum(file.stat().st_size for entry in entries for file in entry.iterdir())


def clear_cache() -> None:
    """Delete all entries of the cache; processes that have mapped one keep its values."""
    for path in cache_folder().glob("*"):
        if (path / _ITEMS).is_file():
            delete_folder(path)
