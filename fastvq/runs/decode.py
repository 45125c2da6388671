"""Coded files back to images, or to arrays of indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq import coding
from fastvq.data.folder import write_images
from fastvq.errors import CodingError
from fastvq.files import check_new, whole, whole_folder

from .load import load_model, load_prior

_BATCH = 100
_DEFAULT = coding.Limits()


def decode_images(run: Path, source: Path, folder: Path, *, limits: coding.Limits = _DEFAULT) -> list[str]:
    """Decode a coded file to PNG files in a new folder; return lines to print.

    Args:
        run: folder of the run whose model decodes.
        source: the coded file.
        folder: the folder to write.
        limits: a file that exceeds one of them is refused.

    Raises:
        CheckpointError, CodingError: an invalid run or file, a file of another model, or indices that are not images.
        FileExistsError: the folder exists.
    """
    check_new(folder)
    vqvae, config = load_model(run)
    data = coding.load(source)
    side = config.image_size // 2**config.downsamples
    header, expected = coding.read_header(data), (config.codebook_size, (side, side), False)
    if (header.codebook_size, header.shape[1:], header.missing) != expected:
        missing = ", some of them missing" if header.missing else ""
        raise CodingError(
            f"{source} holds indices of shape {header.shape} in [0, {header.codebook_size}){missing}; an image of {run}"
            f" is {side} x {side} indices in [0, {config.codebook_size})"
        )
    indices = _decoded(data, run, fingerprint=coding.fingerprint(vqvae), limits=limits)
    with whole_folder(folder) as partial, torch.no_grad():
        for first in range(0, len(indices), _BATCH):
            write_images(partial, vqvae.decode(indices[first : first + _BATCH]).clamp(0, 1), first)
    return [f"{len(indices)} images: {folder}"]


def decode_array(source: Path, path: Path, *, run: Path | None = None, limits: coding.Limits = _DEFAULT) -> list[str]:
    """Decode a coded file to an .npy file of int64 indices; return lines to print.

    Args:
        source: the coded file.
        path: the .npy file to write.
        run: folder of the run whose prior the file was coded with, if it was coded with one.
        limits: a file that exceeds one of them is refused.

    Raises:
        CheckpointError, CodingError: an invalid run or file.
    """
    indices = _decoded(coding.load(source), run, limits=limits).numpy()
    with whole(path) as file:
        np.save(file, indices)
    return [f"{path}: indices of shape {indices.shape}"]


def _decoded(
    data: bytes, run: Path | None, *, fingerprint: bytes | None = None, limits: coding.Limits = _DEFAULT
) -> Tensor:
    prior = None
    if coding.read_header(data).model == "prior":
        if run is None:
            raise CodingError("--run: needed, as the file was coded with a run's prior")
        prior = load_prior(run)[0]
    return coding.decode(data, fingerprint=fingerprint, prior=prior, **limits._asdict())
