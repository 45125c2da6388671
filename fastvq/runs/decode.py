"""Coded files back to images or other examples, or to arrays of indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq import coding
from fastvq.errors import CodingError, ConfigError, counted, with_article
from fastvq.extras import tracked
from fastvq.files import StrPath, check_new, whole, whole_folder
from fastvq.modalities import modality_of

from .encode import range_of
from .load import load_model, load_prior
from .outputs import check_ending, check_outside_data, is_folder, write_numbered

_BATCH = 100
_DEFAULT = coding.Limits()
_FOR_INDICES = "; the indices alone go to an .npy file"


def decode_examples(run: StrPath, source: StrPath, path: StrPath, *, limits: coding.Limits = _DEFAULT) -> list[str]:
    """Decode a coded file to images, or what the run is trained on; return lines to print.

    Args:
        run: folder of the run whose model decodes.
        source: the coded file.
        path: a new folder for files; or a file to write, whose ending is one of those that the modality writes, for a
            file of one example. Clips of audio or video go into one file one after the other, as a long file was cut.
        limits: a file that exceeds one of them is refused.

    Raises:
        CheckpointError, CodingError: an invalid run or file, a file of another model, or indices of another grid.
        ConfigError: `path` has another ending, or that of one example where there are several.
        FileExistsError: the folder exists.
    """
    vqvae, config = load_model(run)
    modality = modality_of(config.modality)
    one, many = modality.noun
    check_ending(path, sorted(modality.reader.written), folder=many, also=_FOR_INDICES)
    if is_folder(path):
        check_new(Path(path))
    check_outside_data(path, run)
    data = coding.load(source)
    if config.without_indices:
        raise CodingError(f"{run} {config.without_indices}")
    shape, size = vqvae.adapter.index_shape(config.feature_grid), vqvae.codebook_size
    header = coding.read_header(data)
    if vqvae.adapter.decodes_leading and isinstance(size, tuple) and len(header.shape) == len(shape) + 1:
        size, shape = size[: header.shape[-1]], (*shape[:-1], min(shape[-1], header.shape[-1]))
    if (header.codebook_size, header.shape[1:], header.missing) != (size, shape, False):
        missing = ", some of them missing" if header.missing else ""
        raise CodingError(
            f"{source} holds indices of shape {header.shape} in {range_of(header.codebook_size)}{missing};"
            f" {with_article(one)} of {run} is {' x '.join(map(str, shape))} indices in {range_of(size)}"
        )
    joined = modality.seconds(config) is not None
    if not is_folder(path) and header.shape[0] != 1 and not (joined and header.shape[0]):
        raise ConfigError(f"out: {path} would hold one {one}, but {source} holds {header.shape[0]}: give a new folder")
    indices = _decoded(data, run, fingerprint=coding.fingerprint(vqvae), limits=limits)
    with torch.no_grad():
        if not is_folder(path):
            batches = tracked(indices.split(_BATCH), len(indices), one, count=len)
            # Time is the first axis of a clip (C, T, ...).
            signal = torch.cat([clip for batch in batches for clip in vqvae.restore(batch)], 1)
            with whole(path) as file:
                modality.write(file, signal, config, Path(path).suffix)
        else:
            with whole_folder(path) as partial:
                batches = tracked(indices.split(_BATCH), len(indices), one, count=len)
                for number, batch in enumerate(batches):
                    write_numbered(partial, modality, vqvae.restore(batch), config, number * _BATCH)
    return [f"{counted(len(indices), one, many)}: {path}"]


def decode_array(
    source: StrPath, path: StrPath, *, run: StrPath | None = None, limits: coding.Limits = _DEFAULT
) -> list[str]:
    """Decode a coded file to an .npy file of int64 indices; return lines to print.

    Args:
        source: the coded file.
        path: the .npy file to write.
        run: folder of the run whose prior the file was coded with, if it was coded with one; a file of another model is
            refused.
        limits: a file that exceeds one of them is refused.

    Raises:
        CheckpointError, CodingError: an invalid run or file.
        ConfigError: `path` has another ending.
    """
    check_ending(path, [".npy"])
    data = coding.load(source)
    fingerprint = None
    if run is not None and any(coding.read_header(data).fingerprint):
        fingerprint = coding.fingerprint(load_model(run)[0])
    indices = _decoded(data, run, fingerprint=fingerprint, limits=limits).numpy()
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
