"""Images to small files and back, by a run's model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq import coding
from fastvq.data.folder import SUFFIXES, read_image, write_images
from fastvq.data.images import to_float
from fastvq.errors import CodingError, DataError
from fastvq.files import check_new, whole, whole_folder
from fastvq.models import VQVAE, Prior
from fastvq.training.build import load_images
from fastvq.training.prior import load_prior

from .load import load_model

HELD_OUT = "held-out"
_BATCH = 100


def encode_images(run: Path, source: Path, path: Path, *, model: str = "adaptive") -> list[str]:
    """Write the codes of images to one file; return lines to print.

    Args:
        run: folder of the run whose model encodes.
        source: an image, a folder of images, or "held-out" for those that the run never learned from.
        path: the file to write.
        model: how the codes are coded, see `fastvq.coding.encode`; "prior" is the run's own, which is told the classes
            of held-out images where they have some.

    Raises:
        CheckpointError, DataError, CodingError: a run, an image or a model that can't be.
    """
    vqvae, config = load_model(run)
    size = config.codebook_size
    if config.bottleneck == "none":
        raise CodingError(f"{run} was trained without a bottleneck: it has no codes")
    prior = _prior(run, model)
    labels = None
    if str(source) == HELD_OUT:
        if source.exists():
            raise DataError(f"{source} stands for the run's held-out images, but is here too: give its full path")
        held_out = load_images(config)
        images = held_out.test
        labels = held_out.test_labels if prior is not None and prior.classes else None
    else:
        files = _image_files(source)
        images = torch.stack([read_image(f, image_size=config.image_size, grayscale=config.grayscale) for f in files])
    codes = _codes(vqvae, images)
    data = coding.encode(codes, size, model=model, fingerprint=coding.fingerprint(vqvae), prior=prior, labels=labels)
    if not torch.equal(coding.decode(data, prior=prior, max_indices=codes.numel()), codes):
        raise CodingError(f"{source}: the codes don't decode to what they were; nothing was written")
    coding.save(path, data)
    bits = 8 * len(data) / codes.numel()
    return [
        f"{len(images)} images of {images[0].numel()} bytes, {codes[0].numel()} codes each",
        f"{path}: {len(data)} bytes, {bits:.2f} bits a code ({np.log2(size):.2f} without a model of them),"
        f" {images.numel() / len(data):.0f} times smaller than the pixels",
    ]


def decode_images(run: Path, source: Path, folder: Path, *, max_indices: int = coding.MAX_INDICES) -> list[str]:
    """Write the images that a file's codes stand for as PNG files into a new folder; return lines to print.

    Raises:
        CheckpointError, CodingError: a run or a file that can't be, one of another model, or codes that are no images.
        FileExistsError: the folder exists.
    """
    check_new(folder)
    vqvae, config = load_model(run)
    data = coding.load(source)
    side = config.image_size // 2**config.downsamples
    header, expected = coding.read_header(data), (config.codebook_size, (side, side), False)
    if (header.codebook_size, header.shape[1:], header.missing) != expected:
        holes = ", some of them missing" if header.missing else ""
        raise CodingError(
            f"{source} holds codes of shape {header.shape} in [0, {header.codebook_size}){holes}; an image of {run} is"
            f" {side} x {side} codes in [0, {config.codebook_size})"
        )
    codes = _decoded(data, run, fingerprint=coding.fingerprint(vqvae), max_indices=max_indices)
    with whole_folder(folder) as partial, torch.no_grad():
        for first in range(0, len(codes), _BATCH):
            write_images(partial, vqvae.decode(codes[first : first + _BATCH]).clamp(0, 1), first)
    return [f"{len(codes)} images: {folder}"]


def encode_array(
    source: Path, path: Path, codebook_size: int | None, *, model: str = "adaptive", run: Path | None = None
) -> list[str]:
    """Write the codes of an .npy file, integers of any shape with samples along the first axis, to a coded file.

    Args:
        codebook_size: K; by default the run's, or as many as the largest code needs.
        run: the run whose codes they are: the file then decodes to images too. The model "prior" is its prior.

    Raises:
        CheckpointError, CodingError: a run, an array or a model that can't be.
    """
    try:
        values = np.load(source, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise CodingError(f"{source} can't be read as .npy: {error}") from error
    if not isinstance(values, np.ndarray):
        raise CodingError(f"{source} can't be read as .npy: it holds several arrays")
    if not np.issubdtype(values.dtype, np.integer):
        raise CodingError(f"{source} must hold integers, got {values.dtype}")
    if values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise CodingError(f"{source}: codes must lie in [-1, 2^24), got {values.max()}")
    codes = torch.from_numpy(values.astype(np.int64))
    prior, signed = _prior(run, model), bytes(8)
    if run is not None:
        vqvae, config = load_model(run)
        if codebook_size not in (None, config.codebook_size):
            raise CodingError(f"--codebook-size: {run} has codes in [0, {config.codebook_size}), got {codebook_size}")
        codebook_size = config.codebook_size
        signed = coding.fingerprint(vqvae)
    size = codebook_size if codebook_size is not None else max(1, int(codes.max()) + 1) if codes.numel() else 1
    data = coding.encode(codes, size, model=model, fingerprint=signed, prior=prior)
    coding.save(path, data)
    bits = 8 * len(data) / max(1, codes.numel())
    return [f"{path}: {len(data)} bytes, {bits:.2f} bits a code ({np.log2(size):.2f} without a model of them)"]


def decode_array(
    source: Path, path: Path, *, run: Path | None = None, max_indices: int = coding.MAX_INDICES
) -> list[str]:
    """Write the codes of a file as .npy, int64.

    Args:
        run: for a file coded with a prior, the run that it belongs to.
        max_indices: a file of more is refused.
    """
    codes = _decoded(coding.load(source), run, max_indices=max_indices).numpy()
    with whole(path) as partial, partial.open("wb") as stream:
        np.save(stream, codes)
    return [f"{path}: {codes.shape} codes"]


def _prior(run: Path | None, model: str) -> Prior | None:
    if model != "prior":
        return None
    if run is None:
        raise CodingError("--run: which run's prior codes them?")
    return load_prior(run)[0]


def _decoded(
    data: bytes, run: Path | None, *, fingerprint: bytes | None = None, max_indices: int = coding.MAX_INDICES
) -> Tensor:
    prior = _prior(run, coding.read_header(data).model)
    return coding.decode(data, fingerprint=fingerprint, prior=prior, max_indices=max_indices)


def _codes(vqvae: VQVAE, images: Tensor) -> Tensor:
    return torch.cat([vqvae.encode(to_float(batch)) for batch in images.split(_BATCH)])


def _image_files(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(p for p in source.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"{source} holds no images (files that end in {', '.join(sorted(SUFFIXES))})")
        return files
    if not source.exists():
        raise DataError(f"{source} doesn't exist")
    return [source]
