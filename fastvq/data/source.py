"""Sources of data sets: items with names, classes and captions, in files or in tar shards."""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvq.errors import DataError, counted, listed
from fastvq.extras import require
from fastvq.files import StrPath

from .image_format import ImageFormat
from .image_io import SUFFIXES, read_image

CAPTIONS = "captions.jsonl"
"""File in a folder of images with one caption a line: {"file_name": "a/b.png", "text": "a red house"}."""


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        name: path inside the folder, or shard and key; unique.
        class_name: name of its class, or None.
        caption: its text, or None.
    """

    name: str
    class_name: str | None = None
    caption: str | None = None


class Source(Protocol):
    """Images that have not been read yet."""

    root: Path

    def stamp(self) -> list[tuple[str, int, int]]:
        """Return path inside `root`, size and time of change of each file: equal stamps mean equal images."""

    def items(self) -> list[Item]:
        """Return all items in a fixed order."""

    def read(self, format: ImageFormat, workers: int) -> Iterator[tuple[str, Tensor | str]]:
        """Yield each item's name with its pixels, or with the reason why it cannot be read, in any order."""


class Folder:
    """A folder of image files.

    The first subfolder on the way to a file is its class, if every file has one and there are at least two. A caption
    is the line of a file in `CAPTIONS`, or the text in a file of the same name that ends in .txt.

    Args:
        root: searched recursively, see `image_files`.

    Raises:
        DataError: no such folder, or none with images; see `image_files`.
    """

    def __init__(self, root: StrPath) -> None:
        self.root = Path(root)
        self.paths = image_files(self.root)
        self.names = [path.relative_to(self.root).as_posix() for path in self.paths]

    def stamp(self) -> list[tuple[str, int, int]]:
        """Return path, size and time of change of each image and of each file with captions."""
        texts = [path for path in (self.root / CAPTIONS, *self._texts()) if path.is_file()]
        return [_stamp(path, self.root) for path in (*self.paths, *texts)]

    def items(self) -> list[Item]:
        """Return all images in the order of their paths.

        Raises:
            DataError: a line of the captions is no caption.
        """
        folders = [name.partition("/")[0] if "/" in name else None for name in self.names]
        classed = None not in folders and len(set(folders)) > 1
        captions = self._captions()
        return [
            Item(name, folder if classed else None, captions.get(name))
            for name, folder in zip(self.names, folders, strict=True)
        ]

    def read(self, format: ImageFormat, workers: int) -> Iterator[tuple[str, Tensor | str]]:
        """Yield name and pixels, or the reason why a file cannot be read, in the order of `items`."""
        loader = DataLoader(_Files(self.paths, format), batch_size=None, num_workers=workers)
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
                f"{path}: {counted(len(unknown), 'caption')} of {len(captions)} left out, of images that are not there:"
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
    """Pixels of files by their number, or why a file cannot be read: an exception would end the workers."""

    def __init__(self, paths: Sequence[Path], format: ImageFormat) -> None:
        self.paths, self.format = paths, format

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor | str:
        try:
            return read_image(self.paths[row], self.format)
        except DataError as error:
            return str(error)


class Shards:
    """Tar files of samples, as the webdataset library writes and reads them.

    The files of a sample have one name and different endings: an image, and as they are there a class (.cls), a caption
    (.txt) or both in one object (.json, with "label" and "text" or "caption").

    Args:
        root: a tar file, or a folder with tar files.

    Raises:
        DataError: a shard is damaged, or holds no samples with images, or two samples of one name.
        MissingExtraError: webdataset is not installed.
    """

    def __init__(self, root: StrPath) -> None:
        self.root = Path(root)
        self.paths = shard_files(self.root)
        self._home = self.root if self.root.is_dir() else self.root.parent

    def stamp(self) -> list[tuple[str, int, int]]:
        """Return path, size and time of change of each shard."""
        return [_stamp(path, self._home) for path in self.paths]

    def items(self) -> list[Item]:
        """Return all samples with an image in the order of the shards; this reads them once."""
        items = [
            Item(_sample_name(sample, self._home), _class_of(sample), _caption_of(sample))
            for sample in self._samples()
            if _image_of(sample)
        ]
        if not items:
            raise DataError(f"{self.root} holds no samples with an image ({', '.join(sorted(SUFFIXES))})")
        if len({item.name for item in items}) < len(items):
            raise DataError(f"{self.root} holds two samples of one name in one shard")
        return items

    def read(self, format: ImageFormat, workers: int) -> Iterator[tuple[str, Tensor | str]]:
        """Yield name and pixels, or the reason why a sample cannot be read; each worker reads shards of its own."""
        samples = self._dataset().select(_image_of).map(partial(_sample_pixels, self._home, format))
        yield from _in_words(self.root, DataLoader(samples, batch_size=None, num_workers=min(workers, len(self.paths))))

    def _dataset(self) -> Any:
        paths = [str(path) for path in self.paths]
        return require("webdataset", "shards").WebDataset(paths, shardshuffle=False, empty_check=False)

    def _samples(self) -> Iterator[dict[str, Any]]:
        yield from _in_words(self.root, self._dataset())


def _sample_name(sample: dict[str, Any], home: Path) -> str:
    return f"{Path(sample['__url__']).relative_to(home).as_posix()}/{sample['__key__']}"


def _sample_pixels(home: Path, format: ImageFormat, sample: dict[str, Any]) -> tuple[str, Tensor | str]:
    name, ending = _sample_name(sample, home), _image_of(sample)
    try:
        return name, read_image(home / f"{name}.{ending}", format, sample[str(ending)])
    except DataError as error:
        return name, str(error)


def _in_words(root: Path, samples: Any) -> Iterator[Any]:
    """Yield samples; an error of the library for a damaged shard becomes a DataError."""
    try:
        yield from samples
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{root}: a shard cannot be read: {error}") from error


def _image_of(sample: dict[str, Any]) -> str | None:
    """Return the ending of a sample's image, without the dot."""
    return next((ending for ending in sample if f".{ending.rpartition('.')[2]}" in SUFFIXES), None)


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


def open_source(root: StrPath) -> Source:
    """Return the images of a folder, or of tar shards: a folder with tar files and no images beside them.

    Raises:
        DataError: there is no such folder or shard, or it holds no images.
    """
    path = Path(root)
    if path.suffix.lower() == ".tar" or (path.is_dir() and shard_files(path) and not _any_image(path)):
        return Shards(path)
    return Folder(path)


def shard_files(root: StrPath) -> list[Path]:
    """Return a tar file, or those in a folder in the order of their names."""
    root = Path(root)
    if not root.is_dir():
        if not root.is_file():
            raise DataError(f"{root} doesn't exist")
        return [root]
    return sorted(path for path in root.glob("[!.]*") if path.suffix.lower() == ".tar" and path.is_file())


def image_files(root: StrPath) -> list[Path]:
    """Return the images in a folder and its subfolders, in the order of their paths.

    Hidden files are left out, and all files in hidden folders, which hold thumbnails or files that are being written.

    Raises:
        DataError: no such folder, or none with images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder" if root.exists() else f"{root} doesn't exist")
    paths = sorted(_images_in(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise DataError(f"{root} holds no images (files that end in {', '.join(sorted(SUFFIXES))})")
    return paths


def _any_image(root: Path) -> bool:
    return next(_images_in(root), None) is not None


def _images_in(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("[!.]*") if _is_image(path.relative_to(root)) and path.is_file())


def _is_image(path: Path) -> bool:
    """Return whether a path inside a folder of images is that of an image: by its ending, and not hidden."""
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)
