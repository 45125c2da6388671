"""Any folder of images, or tar shards, as a data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvq.errors import DataError, SkippedFilesWarning, counted, listed
from fastvq.files import StrPath

from .decoded import Decoded, decode
from .image_format import ImageFormat
from .image_io import read_image
from .images import Images, central_crop
from .registry import folder_name
from .source import Item, image_files, open_source


def load_folder(
    root: StrPath,
    *,
    image_size: int,
    image_width: int | None = None,
    grayscale: bool = False,
    fit: str = "crop",
    crop_from: int | None = None,
    test_fraction: float = 0.1,
    skip_unreadable: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Images:
    """Return every image under `root`, brought to one size, split into images to learn from and to hold out.

    The images are decoded once, into a file of the user's cache that later calls map: a set may be larger than memory.
    A file is held out if the hash of its path inside the folder falls below `test_fraction`: the split is the same on
    every machine, and adding files does not move others to the other side. A file is on one side only. If all files of
    a class would be held out, one of them is learned from.

    Args:
        root: a folder, searched recursively for image files, or tar shards; see `Folder` and `Shards` in
            `fastvq.data.source` for classes and captions.
        image_size: height of the images in pixels, and their width unless `image_width` is given.
        image_width: width in pixels.
        grayscale: one channel instead of three.
        fit: what becomes of an image of another aspect, see `ImageFormat`.
        crop_from: height, at least `image_size`, that images are scaled to and then cropped from: at random while
            training (`Images.uncropped`), else from the center.
        test_fraction: share of the files to hold out, between 0 and 1.
        skip_unreadable: leave out files that cannot be read, with a `SkippedFilesWarning`.
        workers: processes that decode; by default as many as there are cores where there are many images.
        progress: show a progress bar on stderr while decoding.

    Raises:
        ConfigError: an invalid `fit`.
        DataError: no such folder, fewer than two images in it, an invalid size, or files that are not readable images:
            all are named.
        MissingExtraError: Pillow is not installed, or webdataset for tar shards.
    """
    target = ImageFormat(image_size, image_width or image_size, grayscale, fit)
    stored = target
    if crop_from is not None:
        if crop_from < image_size:
            raise DataError(f"crop_from must be at least image_size = {image_size}, got {crop_from}")
        stored = ImageFormat(crop_from, round(crop_from * target.width / target.height), grayscale, fit)
    source = open_source(root)
    decoded = decode(source, stored, test_fraction, workers=workers, progress=progress)
    report_failures(decoded.failures, len(decoded.items), skip_unreadable=skip_unreadable)
    if len(decoded.items) < 2:
        found = "one readable image" if decoded.failures else "one image"
        raise DataError(f"{source.root} holds {found}: at least two are needed, one to learn from and one to hold out")
    return _as_images(folder_name(root), decoded, target, cropped=crop_from is not None)


def _as_images(name: str, decoded: Decoded, target: ImageFormat, *, cropped: bool) -> Images:
    train, test = decoded.items[: decoded.train], decoded.items[decoded.train :]
    pixels = decoded.pixels[: decoded.train], decoded.pixels[decoded.train :]
    classes = sorted({item.class_name for item in decoded.items if item.class_name is not None})
    labeled = bool(classes) and all(item.class_name is not None for item in decoded.items)
    unlearned = sorted(set(classes) - {item.class_name for item in train}) if labeled else []
    if unlearned:
        warnings.warn(
            f"{name}: {counted(len(unlearned), 'class', 'classes')} without an image to learn from:{listed(unlearned)}",
            RuntimeWarning,
            stacklevel=3,
        )
    captioned = any(item.caption is not None for item in decoded.items)
    return Images(
        name=name,
        train=central_crop(pixels[0], target.height, target.width) if cropped else pixels[0],
        test=central_crop(pixels[1], target.height, target.width) if cropped else pixels[1],
        test_names=tuple(item.name for item in test),
        train_labels=_labels(train, classes) if labeled else None,
        test_labels=_labels(test, classes) if labeled else None,
        class_names=tuple(classes) if labeled else None,
        train_captions=tuple(item.caption or "" for item in train) if captioned else None,
        test_captions=tuple(item.caption or "" for item in test) if captioned else None,
        uncropped=pixels[0] if cropped else None,
        digest=decoded.digest,
    )


def _labels(items: Sequence[Item], classes: list[str]) -> Tensor:
    number = {name: label for label, name in enumerate(classes)}
    return torch.tensor([number[str(item.class_name)] for item in items], dtype=torch.int64)


def read_images(
    sources: Iterable[StrPath], format: ImageFormat, *, skip_unreadable: bool = False
) -> tuple[Tensor, list[str]]:
    """Return image files, and all images in folders, as uint8 (N, C, height, width), and their paths.

    Args:
        sources: files, whatever their endings, and folders.
        format: size and color.
        skip_unreadable: as for `load_folder`.

    Raises:
        DataError: a source doesn't exist, a folder holds no images, or no file or not all files can be read.
    """
    files: dict[Path, None] = {}
    missing = []
    for source in map(Path, sources):
        if not source.exists():
            missing.append(str(source))
        else:
            files |= dict.fromkeys(image_files(source) if source.is_dir() else [source])
    if missing:
        raise DataError(f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist")
    pixels: dict[Path, Tensor] = {}
    failures: dict[str, str] = {}
    for path in files:
        try:
            pixels[path] = read_image(path, format)
        except DataError as error:
            failures[str(path)] = str(error)
    report_failures(failures, len(pixels), skip_unreadable=skip_unreadable)
    return torch.stack(list(pixels.values())), [str(path) for path in pixels]


def report_failures(failures: Mapping[str, str], readable: int, *, skip_unreadable: bool) -> None:
    """Raise or warn once for all files that cannot be read.

    Args:
        failures: the reason for each file, which names it.
        readable: number of files that can be read.
        skip_unreadable: warn, unless none is left.
    """
    failed = list(failures.values())
    if not failed:
        return
    if len(failed) == 1 and not skip_unreadable:
        raise DataError(f"{failed[0]} (skip_unreadable leaves such files out)")
    if not skip_unreadable:
        raise DataError(
            f"{len(failed)} of {len(failed) + readable} files cannot be read as images"
            f" (skip_unreadable leaves them out):{listed(failed)}"
        )
    if not readable:
        raise DataError(f"none of {counted(len(failed), 'file')} can be read as an image:{listed(failed)}")
    warnings.warn(
        f"skipped {counted(len(failed), 'file')} of {len(failed) + readable}:{listed(failed)}",
        SkippedFilesWarning,
        stacklevel=3,
    )
