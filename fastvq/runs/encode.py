"""Images or other examples, or arrays of indices, to one small file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastvq import coding, distributed
from fastvq.data.arrays import read_array
from fastvq.data.examples import to_float
from fastvq.data.folder import read_files
from fastvq.errors import CodingError, counted
from fastvq.extras import tracked
from fastvq.files import StrPath
from fastvq.modalities import TrainConfig, modality_of
from fastvq.models import VQVAE, Prior
from fastvq.training import ranks

from .load import load_model, load_prior, run_examples
from .outputs import check_ending

ENDING = ".fvq"
"""Ending of coded files."""
_BATCH = 100
_VALUES = {torch.uint8: "pixels", torch.int16: "waveform"}
_UNLIMITED = coding.Limits(*[1 << 62] * len(coding.Limits._fields))._asdict()


def encode_files(
    run: StrPath,
    sources: StrPath | Sequence[StrPath],
    path: StrPath,
    *,
    model: str = "adaptive",
    skip_unreadable: bool = False,
    stages: int | None = None,
) -> list[str]:
    """Write the indices of images, or of what the run is trained on, to one file; return lines to print.

    Called by several processes of torchrun, each encodes a part; rank 0 writes, and returns the lines.

    Args:
        run: folder of the run whose model encodes.
        sources: a file or a folder of files, or several of them; a long file of audio or video is cut into clips.
        path: the file to write, which ends in .fvq.
        model: probability model of the indices, see `fastvq.coding.encode`; "prior" is the run's own.
        skip_unreadable: see `load_folder`.
        stages: number of leading stages of a residual quantizer whose indices are written: fewer take less space and
            decode to a coarser signal; all by default.

    Raises:
        CheckpointError, DataError, CodingError: an invalid run, file or model.
        ConfigError: `path` has another ending.
    """
    check_ending(path, [ENDING])
    vqvae, config, prior = _models(run, model)
    stored, _ = read_files(
        [sources] if isinstance(sources, (str, os.PathLike)) else sources,
        modality_of(config.modality).reader,
        config.example_format,
        skip_unreadable=skip_unreadable,
    )
    return _encode(vqvae, config, stored, path, model, prior, None, stages)


def encode_held_out(
    run: StrPath,
    path: StrPath,
    *,
    model: str = "adaptive",
    data: StrPath | None = None,
    stages: int | None = None,
) -> list[str]:
    """Write the indices of a run's held-out examples to one file, like `encode_files`.

    The prior is given the classes of the examples if they have any. `data` is where the data set of the run is now, see
    `run_examples`.
    """
    check_ending(path, [ENDING])
    vqvae, config, prior = _models(run, model)
    examples = ranks.rank_0_first(lambda: run_examples(run, data))
    labels = examples.test_labels if prior is not None and prior.classes else None
    return _encode(vqvae, config, examples.test, path, model, prior, labels, stages)


def _models(run: StrPath, model: str) -> tuple[VQVAE, TrainConfig, Prior | None]:
    vqvae, config = load_model(run)
    if config.without_indices:
        raise CodingError(f"{run} {config.without_indices}")
    if model not in coding.MODELS:
        raise CodingError(f"model: must be one of {', '.join(coding.MODELS)}, got {model!r}")
    return vqvae, config, load_prior(run)[0] if model == "prior" else None


def _encode(
    vqvae: VQVAE,
    config: TrainConfig,
    stored: Tensor,
    path: StrPath,
    model: str,
    prior: Prior | None,
    labels: Tensor | None,
    stages: int | None,
) -> list[str]:
    codebook_size = _leading_sizes(vqvae, stages, model)
    modality = modality_of(config.modality)
    noun, duration = modality.noun, modality.seconds(config)
    batches = list(enumerate(stored.split(_BATCH)))
    own = batches[distributed.rank() :: distributed.world_size()]
    shown = tracked(own, sum(len(batch) for _, batch in own), noun[0], count=lambda b: len(b[1]), shown=ranks.leads())
    encoded = {number: vqvae.encode(to_float(batch)) for number, batch in shown}
    found = {number: part for parts in ranks.gathered_objects(encoded) for number, part in parts.items()}
    if not ranks.leads():
        return []
    indices = torch.cat([found[number] for number, _ in batches])
    if stages is not None:
        indices = indices[..., :stages]
    fingerprint = coding.fingerprint(vqvae)
    data = coding.encode(indices, codebook_size, model=model, fingerprint=fingerprint, prior=prior, labels=labels)
    if not torch.equal(coding.decode(data, prior=prior, **_UNLIMITED), indices):
        raise CodingError(f"{path}: the indices do not survive coding; nothing was written")
    coding.save(path, data)
    ratio = stored.nbytes / len(data)
    size = counted(stored[0].nbytes, "byte")
    rate = ""
    if duration is not None:
        seconds = duration * len(stored)
        rate = f"; {seconds:.2f} seconds at {8 * len(data) / seconds / 1000:.2f} kbit/s"
    return [
        f"{counted(len(stored), *noun)} of {size}, {counted(indices[0].numel(), 'index', 'indices')} each",
        f"{_summary(path, data, indices.numel(), codebook_size)}, {ratio:.0f} times smaller than the"
        f" {_VALUES[stored.dtype]}{rate}",
    ]


def _leading_sizes(vqvae: VQVAE, stages: int | None, model: str) -> int | tuple[int, ...]:
    """Return the sizes of the codebooks whose indices are written.

    Raises:
        CodingError: `stages` is more than the codebooks of the run, or the indices cannot be coded.
    """
    sizes = vqvae.codebook_size
    if stages is None:
        return sizes
    if isinstance(sizes, int) or not vqvae.adapter.decodes_leading:
        raise CodingError("stages: only for a run with a residual quantizer")
    if not 1 <= stages <= len(sizes):
        raise CodingError(f"stages: must lie in [1, {len(sizes)}], got {stages}")
    if model == "prior" and stages < len(sizes):
        raise CodingError(f"stages: a prior codes all {len(sizes)}, got {stages}")
    return sizes[:stages]


def encode_array(
    source: StrPath,
    path: StrPath,
    codebook_size: int | None = None,
    *,
    model: str = "adaptive",
    run: StrPath | None = None,
) -> list[str]:
    """Write the indices in an .npy file, integers of any shape with samples along the first axis, to a coded file.

    Args:
        source: the .npy file.
        path: the file to write, which ends in .fvq.
        codebook_size: K; by default the run's, or the largest index + 1.
        model: probability model of the indices; "prior" is the run's own.
        run: the run that the indices belong to: the file then also decodes to examples.

    Raises:
        CheckpointError, DataError, CodingError: an invalid run, array or model.
        ConfigError: `path` has another ending.
    """
    check_ending(path, [ENDING])
    values = read_array(source, np.integer)
    if values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise CodingError(f"{source}: indices must lie in [-1, 2^24), got {values.max()}")
    indices = torch.from_numpy(values.astype(np.int64))
    prior, fingerprint = None, bytes(8)
    size: int | tuple[int, ...]
    if model == "prior":
        if run is None:
            raise CodingError("--run: needed to code with a run's prior")
        prior = load_prior(run)[0]
    if run is not None:
        vqvae, config = load_model(run)
        if config.without_indices:
            raise CodingError(f"{run} {config.without_indices}")
        own = vqvae.codebook_size
        if codebook_size not in (None, own):
            raise CodingError(f"--codebook-size: {run} has indices in {range_of(own)}, got {codebook_size}")
        size, fingerprint = own, coding.fingerprint(vqvae)
    elif codebook_size is not None:
        size = codebook_size
    else:
        size = max(1, int(indices.max()) + 1) if indices.numel() else 1
    data = coding.encode(indices, size, model=model, fingerprint=fingerprint, prior=prior)
    coding.save(path, data)
    return [_summary(path, data, indices.numel(), size)]


def range_of(size: int | tuple[int, ...]) -> str:
    """Return the range of indices as text, for one codebook or several."""
    if isinstance(size, int):
        return f"[0, {size})"
    each = f"[0, {size[0]})" if len(set(size)) == 1 else f"below {', '.join(map(str, size))}"
    return f"{each} of {len(size)} codebooks"


def _summary(path: StrPath, data: bytes, count: int, codebook_size: int | tuple[int, ...]) -> str:
    bits = 8 * len(data) / max(1, count)
    sizes = (codebook_size,) if isinstance(codebook_size, int) else codebook_size
    uniform = sum(map(math.log2, sizes)) / len(sizes)
    return f"{path}: {len(data)} bytes, {bits:.2f} bits per index (log2 K: {uniform:.2f})"
