"""Any folder of files, or tar shards, as a data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvq.errors import DataError, SkippedFilesWarning, counted, listed, with_article
from fastvq.files import StrPath

from .decoded import Decoded, decode
from .examples import Examples
from .reader import Format, Reader
from .registry import folder_name
from .source import Item, data_files, open_source


def load_folder(
    root: StrPath,
    reader: Reader,
    format: Format,
    *,
    crop_to: tuple[int, ...] | None = None,
    test_fraction: float = 0.1,
    skip_unreadable: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Examples:
    """Return the examples of all files under `root`, split into examples to learn from and to hold out.

    The files are decoded once, into a file of the user's cache that later calls map: a set may be larger than memory. A
    file is held out if the hash of its path inside the folder falls below `test_fraction`: the split is the same on
    every machine, and adding files does not move others to the other side. A file is on one side only, with all its
    examples. If all files of a class would be held out, one of them is learned from.

    Args:
        root: a folder, searched recursively for files, or tar shards; see `Folder` and `Shards` in
            `fastvq.data.source` for classes and captions.
        reader: the kind of files.
        format: the form that examples are brought to.
        crop_to: size, at most that of the format, that examples are cropped to: at random while training
            (`Examples.uncropped`), else to the center.
        test_fraction: share of the files to hold out, between 0 and 1.
        skip_unreadable: leave out files that cannot be read, with a `SkippedFilesWarning`.
        workers: processes that decode; by default as many as there are cores where there are many files.
        progress: show a progress bar on stderr while decoding.

    Raises:
        DataError: no such folder, fewer than two files in it, an invalid size, or files that cannot be read: all are
            named.
        MissingExtraError: a library that reads such files, or webdataset for tar shards, is not installed.
    """
    source = open_source(root, reader)
    decoded = decode(source, format, test_fraction, workers=workers, progress=progress)
    report_failures(decoded.failures, len(decoded.items), reader, skip_unreadable=skip_unreadable)
    if len(decoded.items) < 2:
        noun = reader.noun[0]
        found = f"one readable {noun}" if decoded.failures else f"one {noun}"
        raise DataError(f"{source.root} holds {found}: at least two are needed, one to learn from and one to hold out")
    return _as_examples(folder_name(root), decoded, reader, crop_to)


def _as_examples(name: str, decoded: Decoded, reader: Reader, crop_to: tuple[int, ...] | None) -> Examples:
    train, test = decoded.items[: decoded.train], decoded.items[decoded.train :]
    boundary = sum(item.examples for item in train)
    values = decoded.values[:boundary], decoded.values[boundary:]
    classes = sorted({item.class_name for item in decoded.items if item.class_name is not None})
    labeled = bool(classes) and all(item.class_name is not None for item in decoded.items)
    unlearned = sorted(set(classes) - {item.class_name for item in train}) if labeled else []
    if unlearned:
        warnings.warn(
            f"{name}: {counted(len(unlearned), 'class', 'classes')} without {with_article(reader.noun[0])} to learn"
            f" from:{listed(unlearned)}",
            RuntimeWarning,
            stacklevel=4,
        )
    captioned = any(item.caption is not None for item in decoded.items)
    return Examples(
        name=name,
        train=values[0] if crop_to is None else central_crop(values[0], crop_to),
        test=values[1] if crop_to is None else central_crop(values[1], crop_to),
        test_names=tuple(_names(test)),
        train_labels=_labels(train, classes) if labeled else None,
        test_labels=_labels(test, classes) if labeled else None,
        class_names=tuple(classes) if labeled else None,
        train_captions=_captions(train) if captioned else None,
        test_captions=_captions(test) if captioned else None,
        uncropped=None if crop_to is None else values[0],
        digest=decoded.digest,
        noun=reader.noun,
    )


def central_crop(examples: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the central part (N, C, *size) of examples, as a view."""
    for axis, length in enumerate(size, start=2):
        examples = examples.narrow(axis, (examples.shape[axis] - length) // 2, length)
    return examples


def _names(items: Iterable[Item]) -> Iterable[str]:
    """Yield a name for each example: that of its file, with its number where a file has several."""
    for item in items:
        yield from numbered(item.name, item.examples)


def numbered(name: str, count: int) -> list[str]:
    """Return a name for each of `count` examples of a file: "NAME [2/5]", or the name alone if there is one."""
    return [name] if count == 1 else [f"{name} [{number}/{count}]" for number in range(1, count + 1)]


def _labels(items: Sequence[Item], classes: list[str]) -> Tensor:
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[str(item.class_name)] for item in items for _ in range(item.examples)]
    return torch.tensor(labels, dtype=torch.int64)


def _captions(items: Sequence[Item]) -> tuple[str, ...]:
    return tuple(item.caption or "" for item in items for _ in range(item.examples))


def read_files(
    sources: Iterable[StrPath], reader: Reader, format: Format, *, skip_unreadable: bool = False
) -> tuple[Tensor, list[str]]:
    """Return the examples of files, and of all files in folders, (N, *format.shape), and a name for each.

    Args:
        sources: files, whatever their endings, and folders.
        reader: the kind of files.
        format: the form that examples are brought to.
        skip_unreadable: as for `load_folder`.

    Raises:
        DataError: a source doesn't exist, a folder holds no such files, or no file or not all files can be read.
    """
    files: dict[Path, None] = {}
    missing = []
    for source in map(Path, sources):
        if not source.exists():
            missing.append(str(source))
        else:
            files |= dict.fromkeys(data_files(source, reader) if source.is_dir() else [source])
    if missing:
        raise DataError(f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist")
    values: dict[Path, Tensor] = {}
    failures: dict[str, str] = {}
    for path in files:
        try:
            values[path] = reader.read(path, format, None)
        except DataError as error:
            failures[str(path)] = str(error)
    report_failures(failures, len(values), reader, skip_unreadable=skip_unreadable)
    return torch.cat(list(values.values())), [
        name for path, own in values.items() for name in numbered(str(path), len(own))
    ]


def report_failures(failures: Mapping[str, str], readable: int, reader: Reader, *, skip_unreadable: bool) -> None:
    """Raise or warn once for all files that cannot be read.

    Args:
        failures: the reason for each file, which names it.
        readable: number of files that can be read.
        reader: the kind of files.
        skip_unreadable: warn, unless none is left.
    """
    failed = list(failures.values())
    if not failed:
        return
    one, many = reader.noun
    if len(failed) == 1 and not skip_unreadable:
        raise DataError(f"{failed[0]} (skip_unreadable leaves such files out)")
    if not skip_unreadable:
        raise DataError(
            f"{len(failed)} of {len(failed) + readable} files cannot be read as {many}"
            f" (skip_unreadable leaves them out):{listed(failed)}"
        )
    if not readable:
        raise DataError(f"none of {counted(len(failed), 'file')} can be read as {with_article(one)}:{listed(failed)}")
    warnings.warn(
        f"skipped {counted(len(failed), 'file')} of {len(failed) + readable}:{listed(failed)}",
        SkippedFilesWarning,
        stacklevel=3,
    )
