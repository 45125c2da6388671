"""Coded files back to images, or to arrays of indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq import coding
from fastvq.data.image_io import WRITTEN, write_image, write_images
from fastvq.errors import CodingError, ConfigError, counted
from fastvq.extras import tracked
from fastvq.files import StrPath, check_new, whole, whole_folder

from .encode import range_of
from .load import load_model, load_prior
from .outputs import check_ending, check_outside_data, is_folder

_BATCH = 100
_DEFAULT = coding.Limits()
_FOR_INDICES = "; the indices alone go to an .npy file"


def decode_images(run: StrPath, source: StrPath, path: StrPath, *, limits: coding.Limits = _DEFAULT) -> list[str]:
    """Decode a coded file to images; return lines to print.

    Args:
        run: folder of the run whose model decodes.
        source: the coded file.
        path: a new folder for PNG files; or, for a file of one image, an image to write, whose ending is in
            `fastvq.data.folder.WRITTEN`.
        limits: a file that exceeds one of them is refused.

    Raises:
        CheckpointError, CodingError: an invalid run or file, a file of another model, or indices that are not images.
        ConfigError: `path` has another ending, or that of an image where there are several.
        FileExistsError: the folder exists.
    """
    check_ending(path, sorted(WRITTEN), folder="images", also=_FOR_INDICES)
    if is_folder(path):
        check_new(Path(path))
    check_outside_data(path, run)
    vqvae, config = load_model(run)
    data = coding.load(source)
    if config.bottleneck == "none":
        raise CodingError(f"{run} was trained without a bottleneck: it has no indices")
    shape, size = vqvae.adapter.index_shape(config.feature_grid), vqvae.codebook_size
    header = coding.read_header(data)
    if (header.codebook_size, header.shape[1:], header.missing) != (size, shape, False):
        missing = ", some of them missing" if header.missing else ""
        raise CodingError(
            f"{source} holds indices of shape {header.shape} in {range_of(header.codebook_size)}{missing}; an image of"
            f" {run} is {' x '.join(map(str, shape))} indices in {range_of(size)}"
        )
    if not is_folder(path) and header.shape[0] != 1:
        raise ConfigError(f"out: {path} would hold one image, but {source} holds {header.shape[0]}: give a new folder")
    indices = _decoded(data, run, fingerprint=coding.fingerprint(vqvae), limits=limits)
    with torch.no_grad():
        if not is_folder(path):
            with whole(path) as file:
                write_image(file, vqvae.decode(indices).clamp(0, 1)[0], Path(path).suffix)
        else:
            with whole_folder(path) as partial:
                batches = tracked(indices.split(_BATCH), len(indices), "image", count=len)
                for number, batch in enumerate(batches):
                    write_images(partial, vqvae.decode(batch).clamp(0, 1), number * _BATCH)
    return [f"{counted(len(indices), 'image')}: {path}"]


def decode_array(
    source: StrPath, path: StrPath, *, run: StrPath | None = None, limits: coding.Limits = _DEFAULT
) -> list[str]:
    """Decode a coded file to an .npy file of int64 indices; return lines to print.

    Args:
        source: the coded file.
        path: the .npy file to write.
        run: folder of the run whose prior the file was coded with, if it was coded with one.
        limits: a file that exceeds one of them is refused.

    Raises:
        CheckpointError, CodingError: an invalid run or file.
        ConfigError: `path` has another ending.
    """
    check_ending(path, [".npy"])
    indices = _decoded(coding.load(source), run, limits=limits).numpy()
    with whole(path) as file:
        np.save(file, indices)
    return [f"{path}: indices of shape {indices.shape}"]


def _decoded(
    data: bytes, run: StrPath | None, *, fingerprint: bytes | None = None, limits: coding.Limits = _DEFAULT
) -> Tensor:
    prior = None
    if coding.read_header(data).model == "prior":
        if run is None:
            raise CodingError("--run: needed, as the file was coded with a run's prior")
        prior = load_prior(run)[0]
    return coding.decode(data, fingerprint=fingerprint, prior=prior, **limits._asdict())
