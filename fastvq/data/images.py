"""Images as a data set: any folder of images, or tar shards, brought to one size."""

from __future__ import annotations

from fastvq.errors import DataError
from fastvq.files import StrPath

from .benchmark_files import load_benchmark_files
from .examples import Examples
from .folder import load_folder
from .image_format import ImageFormat
from .image_io import IMAGES


def load_image_folder(
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
) -> Examples:
    """Return every image under `root`, brought to one size, split into images to learn from and to hold out.

    See `fastvq.data.load_folder` for the split, the cache, classes and captions.

    Args:
        root: a folder of image files, of tar shards, or of the files of a benchmark set, see `load_benchmark_files`.
        image_size: height of the images in pixels, and their width unless `image_width` is given.
        image_width: width in pixels.
        grayscale: one channel instead of three.
        fit: what becomes of an image of another aspect, see `ImageFormat`.
        crop_from: height, at least `image_size`, that images are scaled to and then cropped from: at random while
            training (`Examples.uncropped`), else from the center.
        test_fraction, skip_unreadable, workers, progress: see `load_folder`.

    Raises:
        ConfigError: an invalid `fit`.
        DataError: see `load_folder`; or `crop_from` is below `image_size`.
        MissingExtraError: Pillow is not installed, or webdataset for tar shards.
    """
    target = ImageFormat(image_size, image_width or image_size, grayscale, fit)
    if crop_from is None and (found := load_benchmark_files(root, target)) is not None:
        return found
    stored = target
    if crop_from is not None:
        if crop_from < image_size:
            raise DataError(f"crop_from must be at least image_size = {image_size}, got {crop_from}")
        stored = ImageFormat(crop_from, round(crop_from * target.width / target.height), grayscale, fit)
    return load_folder(
        root,
        IMAGES,
        stored,
        crop_to=None if crop_from is None else (target.height, target.width),
        test_fraction=test_fraction,
        skip_unreadable=skip_unreadable,
        workers=workers,
        progress=progress,
    )
