"""Images, or arrays of indices, to one small file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from fastvq import coding
from fastvq.data.folder import SUFFIXES, read_image
from fastvq.data.images import to_float
from fastvq.errors import CodingError, DataError

from .load import load_model, load_prior, run_images

HELD_OUT = "held-out"
_BATCH = 100
_UNLIMITED = coding.Limits(*[1 << 62] * len(coding.Limits._fields))._asdict()


def encode_images(run: Path, source: Path, path: Path, *, model: str = "adaptive") -> list[str]:
    """Write the indices of images to one file; return lines to print.

    Args:
        run: folder of the run whose model encodes.
        source: an image, a folder of images, or "held-out" for the images that the run has not learned from.
        path: the file to write.
        model: probability model of the indices, see `fastvq.coding.encode`; "prior" is the run's own, which is given
            the classes of held-out images if they have any.

    Raises:
        CheckpointError, DataError, CodingError: an invalid run, image or model.
    """
    vqvae, config = load_model(run)
    size = config.codebook_size
    if config.bottleneck == "none":
        raise CodingError(f"{run} was trained without a bottleneck: it has no indices")
    prior = load_prior(run)[0] if model == "prior" else None
    labels = None
    if str(source) == HELD_OUT:
        if source.exists():
            raise DataError(f"{source} stands for the run's held-out images, but also exists here: give its full path")
        held_out = run_images(run)
        images = held_out.test
        labels = held_out.test_labels if prior is not None and prior.classes else None
    else:
        files = _image_files(source)
        images = torch.stack([read_image(f, image_size=config.image_size, grayscale=config.grayscale) for f in files])
    indices = torch.cat([vqvae.encode(to_float(batch)) for batch in images.split(_BATCH)])
    data = coding.encode(indices, size, model=model, fingerprint=coding.fingerprint(vqvae), prior=prior, labels=labels)
    if not torch.equal(coding.decode(data, prior=prior, **_UNLIMITED), indices):
        raise CodingError(f"{source}: the indices do not survive coding; nothing was written")
    coding.save(path, data)
    ratio = images.numel() / len(data)
    return [
        f"{len(images)} images of {images[0].numel()} bytes, {indices[0].numel()} indices each",
        f"{_summary(path, data, indices.numel(), size)}, {ratio:.0f} times smaller than the pixels",
    ]


def encode_array(
    source: Path, path: Path, codebook_size: int | None, *, model: str = "adaptive", run: Path | None = None
) -> list[str]:
    """Write the indices in an .npy file, integers of any shape with samples along the first axis, to a coded file.

    Args:
        source: the .npy file.
        path: the file to write.
        codebook_size: K; by default the run's, or the largest index + 1.
        model: probability model of the indices; "prior" is the run's own.
        run: the run that the indices belong to: the file then also decodes to images.

    Raises:
        CheckpointError, CodingError: an invalid run, array or model.
    """
    try:
        values = np.load(source, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise CodingError(f"{source} cannot be read as .npy: {error}") from error
    if not isinstance(values, np.ndarray):
        raise CodingError(f"{source} cannot be read as .npy: it holds several arrays")
    if not np.issubdtype(values.dtype, np.integer):
        raise CodingError(f"{source} must hold integers, got {values.dtype}")
    if values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise CodingError(f"{source}: indices must lie in [-1, 2^24), got {values.max()}")
    indices = torch.from_numpy(values.astype(np.int64))
    prior, fingerprint = None, bytes(8)
    if model == "prior":
        if run is None:
            raise CodingError("--run: needed to code with a run's prior")
        prior = load_prior(run)[0]
    if run is not None:
        vqvae, config = load_model(run)
        if codebook_size not in (None, config.codebook_size):
            raise CodingError(f"--codebook-size: {run} has indices in [0, {config.codebook_size}), got {codebook_size}")
        codebook_size = config.codebook_size
        fingerprint = coding.fingerprint(vqvae)
    if codebook_size is None:
        codebook_size = max(1, int(indices.max()) + 1) if indices.numel() else 1
    data = coding.encode(indices, codebook_size, model=model, fingerprint=fingerprint, prior=prior)
    coding.save(path, data)
    return [_summary(path, data, indices.numel(), codebook_size)]


def _summary(path: Path, data: bytes, count: int, codebook_size: int) -> str:
    bits = 8 * len(data) / max(1, count)
    return f"{path}: {len(data)} bytes, {bits:.2f} bits per index (log2 K: {math.log2(codebook_size):.2f})"


def _image_files(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(p for p in source.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"{source} holds no images (files that end in {', '.join(sorted(SUFFIXES))})")
        return files
    if not source.exists():
        raise DataError(f"{source} does not exist")
    return [source]
