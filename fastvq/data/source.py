"""Sources of data sets: items with names, classes and captions, in files or in tar shards."""

from __future__ import annotations

import contextlib
import copy
import json
import tarfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvq.errors import DataError, counted, listed
from fastvq.extras import require
from fastvq.files import StrPath

from .reader import Format, Reader

CAPTIONS = "captions.jsonl"
"""File in a folder with one caption a line: {"file_name": "a/b.png", "text": "a red house"}."""


@dataclass(frozen=True)
class Item:
    """One file of a source, or one sample of a shard.

    Attributes:
        name: path inside the folder, or shard and key; unique.
        class_name: name of its class, or None.
        caption: its text, or None.
        examples: number of its examples, known when it has been read: a long file is cut into several.
    """

    name: str
    class_name: str | None = None
    caption: str | None = None
    examples: int = 1


class Source(Protocol):
    """Files that have not been read yet."""

    root: Path

    def stamp(self) -> list[tuple[str, int, int]]:
        """Return path inside `root`, size and time of change of each file: equal stamps mean equal data."""

    def items(self) -> list[Item]:
        """Return all items in a fixed order."""

    def parts(self, size: int) -> list[Source]:
        """Return sources of some of the files each, in their order: of at most `size` files, or of one tar shard."""

    def read(self, format: Format, workers: int) -> Iterator[tuple[str, Tensor | str]]:
        """Yield each item's name with its examples, or with the reason why it cannot be read, in any order."""


class Folder:
    """A folder of files.

    The first subfolder on the way to a file is its class, if every file has one and there are at least two. A caption
    is the line of a file in `CAPTIONS`, or the text in a file of the same name that ends in .txt.

    Args:
        root: searched recursively, see `data_files`.
        reader: the kind of files.

    Raises:
        DataError: no such folder, or none with such files; see `data_files`.
    """

    def __init__(self, root: StrPath, reader: Reader) -> None:
        self.root, self._reader = Path(root), reader
        self.paths = data_files(self.root, reader)
        self.names = [path.relative_to(self.root).as_posix() for path in self.paths]
        self._items: list[Item] | None = None

    def stamp(self) -> list[tuple[str, int, int]]:
        """Return path, size and time of change of each file, those with captions included."""
        texts = [path for path in (self.root / CAPTIONS, *self._texts()) if path.is_file()]
        return [_stamp(path, self.root) for path in (*self.paths, *texts)]

    def items(self) -> list[Item]:
        """Return all files in the order of their paths.

        Raises:
            DataError: a line of the captions is no caption.
        """
        if self._items is not None:
            return self._items
        folders = [name.partition("/")[0] if "/" in name else None for name in self.names]
        classed = None not in folders and len(set(folders)) > 1
        captions = self._captions()
        self._items = [
            Item(name, folder if classed else None, captions.get(name))
            for name, folder in zip(self.names, folders, strict=True)
        ]
        return self._items

    def parts(self, size: int) -> list[Source]:
        """Return folders of at most `size` files each; classes are those of the whole."""
        items, found = self.items(), []
        for first in range(0, len(items), size):
            part = copy.copy(self)
            rows = slice(first, first + size)
            part.paths, part.names, part._items = self.paths[rows], self.names[rows], items[rows]
            found.append(part)
        return [*found]

    def read(self, format: Format, workers: int) -> Iterator[tuple[str, Tensor | str]]:
        """Yield name and examples, or the reason why a file cannot be read, in the order of `items`."""
        loader = DataLoader(_Files(self.paths, self._reader, format), batch_size=None, num_workers=workers)
        yield from zip(self.names, loader, strict=True)

    def _texts(self) -> list[Path]:
        return [path.with_suffix(".txt") for path in self.paths]

    def _captions(self) -> dict[str, str]:
        path = self.root / CAPTIONS
        if not path.is_file():
            return {
                name: text.read_text(encoding="utf-8", errors="replace").strip()
                for name, text in zip(self.names, self._texts(), strict=True)
                if text.is_file()
            }
        captions = _caption_lines(path)
        unknown = sorted(captions.keys() - set(self.names))
        if unknown:
            warnings.warn(
                f"{path}: {counted(len(unknown), 'caption')} of {len(captions)} left out, of"
                f" {self._reader.noun[1]} that are not there:"
                f"{listed(unknown)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return captions


def _caption_lines(path: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[entry["file_name"]] = entry["text"]
            if not isinstance(entry["text"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f'{path}, line {number}: must be a caption such as {{"file_name": "a.png", "text": "a house"}},'
                f" got {line[:80]}"
            ) from None
    return captions


class _Files(Dataset[Any]):
    """Examples of files by their number, or why a file cannot be read: an exception would end the workers."""

    def __init__(self, paths: Sequence[Path], reader: Reader, format: Format) -> None:
        self.paths, self.reader, self.format = paths, reader, format

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor | str:
        try:
            return self.reader.read(self.paths[row], self.format, None)
        except DataError as error:
            return str(error)


class Shards:
    """Tar files of samples, as the webdataset library writes and reads them.

    The files of a sample have one name and different endings: the data, and as they are there a class (.cls), a caption
    (.txt) or both in one object (.json, with "label" and "text" or "caption").

    Args:
        root: a tar file, or a folder with tar files.
        reader: the kind of files in it.

    Raises:
        DataError: a shard is damaged, or holds no samples with such files, or two samples of one name.
        MissingExtraError: webdataset is not installed.
    """

    def __init__(self, root: StrPath, reader: Reader) -> None:
        self.root, self._reader = Path(root), reader
        self.paths = shard_files(self.root)
        self._home = self.root if self.root.is_dir() else self.root.parent

    def stamp(self) -> list[tuple[str, int, int]]:
        """Return path, size and time of change of each shard."""
        return [_stamp(path, self._home) for path in self.paths]

    def items(self) -> list[Item]:
        """Return all samples with data in the order of the shards; this reads them once."""
        items = [
            Item(_sample_name(sample, self._home), _class_of(sample), _caption_of(sample))
            for sample in self._samples()
            if _data_of(self._reader, sample)
        ]
        if not items:
            raise DataError(f"{self.root} holds no samples with {self._reader.described()}")
        if len({item.name for item in items}) < len(items):
            raise DataError(f"{self.root} holds two samples of one name in one shard")
        return items

    def read(self, format: Format, workers: int) -> Iterator[tuple[str, Tensor | str]]:
        """Yield name and examples, or the reason why a sample cannot be read; each worker reads shards of its own."""
        samples = self._dataset().select(partial(_data_of, self._reader))
        samples = samples.map(partial(_sample_examples, self._reader, self._home, format))
        yield from _in_words(self.root, DataLoader(samples, batch_size=None, num_workers=min(workers, len(self.paths))))

    def parts(self, size: int) -> list[Source]:
        """Return each tar file as a source of its own, whatever the size."""
        found = []
        for path in self.paths:
            part = copy.copy(self)
            part.paths = [path]
            found.append(part)
        return [*found]

    def _dataset(self) -> Any:
        paths = [str(path) for path in self.paths]
        return require("webdataset", "shards").WebDataset(paths, shardshuffle=False, empty_check=False)

    def _samples(self) -> Iterator[dict[str, Any]]:
        yield from _in_words(self.root, self._dataset())


def _sample_name(sample: dict[str, Any], home: Path) -> str:
    return f"{Path(sample['__url__']).relative_to(home).as_posix()}/{sample['__key__']}"


def _sample_examples(reader: Reader, home: Path, format: Format, sample: dict[str, Any]) -> tuple[str, Tensor | str]:
    name, ending = _sample_name(sample, home), _data_of(reader, sample)
    try:
        return name, reader.read(home / f"{name}.{ending}", format, sample[str(ending)])
    except DataError as error:
        return name, str(error)


def _in_words(root: Path, samples: Any) -> Iterator[Any]:
    """Yield samples; an error of the library for a damaged shard becomes a DataError."""
    try:
        yield from samples
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{root}: a shard cannot be read: {error}") from error


def _data_of(reader: Reader, sample: dict[str, Any]) -> str | None:
    """Return the ending of the file with a sample's data, without the dot."""
    return next((ending for ending in sample if f".{ending.rpartition('.')[2]}" in reader.suffixes), None)


def _described(sample: dict[str, Any]) -> dict[str, Any]:
    try:
        entry = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _class_of(sample: dict[str, Any]) -> str | None:
    if "cls" in sample:
        return str(sample["cls"].decode(errors="replace").strip())
    label = _described(sample).get("label")
    return None if label is None else str(label)


def _caption_of(sample: dict[str, Any]) -> str | None:
    if "txt" in sample:
        return str(sample["txt"].decode(errors="replace").strip())
    entry = _described(sample)
    text = entry.get("text", entry.get("caption"))
    return text if isinstance(text, str) else None


def _stamp(path: Path, root: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns


def open_source(root: StrPath, reader: Reader) -> Source:
    """Return the files of a folder, or tar shards: a folder with tar files and none of the reader's beside them.

    Raises:
        DataError: there is no such folder or shard, or it holds no such files.
    """
    path = Path(root)
    if path.suffix.lower() == ".tar" or (path.is_dir() and shard_files(path) and not _any_file(path, reader)):
        return Shards(path, reader)
    return Folder(path, reader)


def shard_files(root: StrPath) -> list[Path]:
    """Return a tar file, or those in a folder in the order of their names."""
    root = Path(root)
    if not root.is_dir():
        if not root.is_file():
            raise DataError(f"{root} doesn't exist")
        return [root]
    return sorted(path for path in root.glob("[!.]*") if path.suffix.lower() == ".tar" and path.is_file())


def data_files(root: StrPath, reader: Reader) -> list[Path]:
    """Return the files of a kind in a folder and its subfolders, in the order of their paths.

    Hidden files are left out, and all files in hidden folders, which hold thumbnails or files that are being written.

    Raises:
        DataError: no such folder, or none with such files.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder" if root.exists() else f"{root} doesn't exist")
    paths = sorted(_files_in(root, reader.suffixes), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise DataError(f"{root} holds no {reader.described()}")
    return paths


def _any_file(root: Path, reader: Reader) -> bool:
    return next(_files_in(root, reader.suffixes), None) is not None


def _files_in(root: Path, suffixes: Collection[str]) -> Iterator[Path]:
    return (path for path in root.rglob("[!.]*") if _is_data(path.relative_to(root), suffixes) and path.is_file())


def _is_data(path: Path, suffixes: Collection[str]) -> bool:
    """Return whether a path inside a folder is that of a file of a kind: by its ending, and not hidden."""
    return path.suffix.lower() in suffixes and not any(part.startswith(".") for part in path.parts)


def suffixes_in(root: StrPath) -> Counter[str]:
    """Return the endings of the files in a folder or in its tar shards that are not hidden, with their numbers."""
    root = Path(root)
    if not root.is_dir():
        return _endings_in([root])
    paths = [path for path in root.rglob("[!.]*") if path.is_file()]
    found = Counter(
        path.suffix.lower() for path in paths if not any(p.startswith(".") for p in path.relative_to(root).parts)
    )
    return found if found.keys() - {".tar"} else _endings_in(shard_files(root)[:1])


def _endings_in(shards: Sequence[Path]) -> Counter[str]:
    """Return the endings of the files in tar shards; a damaged one, which reading it will name, has none."""
    found: Counter[str] = Counter()
    for shard in shards:
        with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(shard) as archive:
            found.update(Path(name).suffix.lower() for name in archive.getnames())
    return found
