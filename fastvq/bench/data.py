"""Shapes and vectors of the benchmarks."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastvq.data.arrays import read_array
from fastvq.errors import BenchError, DataError
from fastvq.files import StrPath, whole

if TYPE_CHECKING:
    from fastvq.modalities import TrainConfig
    from fastvq.models import VQVAE


class Shape(NamedTuple):
    """N vectors, K codes, D dimensions."""

    n: int
    k: int
    d: int

    def __str__(self) -> str:
        return f"N={self.n} K={self.k} D={self.d}"


SHAPES = [
    Shape(16384, 512, 64),
    Shape(16384, 1024, 64),
    Shape(16384, 8192, 64),
    Shape(65536, 1024, 8),
    Shape(16384, 8192, 256),
    Shape(8192, 65536, 16),
    Shape(4096, 262144, 32),
    Shape(64, 1024, 128),
    Shape(1, 2048, 256),
]
OTHER_SHAPES = [
    Shape(8192, 1000, 3),
    Shape(8192, 1000, 12),
    Shape(8192, 777, 24),
    Shape(8192, 3001, 40),
    Shape(8192, 3001, 100),
    Shape(4096, 999, 192),
    Shape(4096, 999, 384),
]

DEFAULT_CODES = 1024
"""Number of codes among which the vectors of a file are searched."""
LATENT_DIMS = (64, 256)
"""Dimensions of the latents for which a model is trained."""
_LATENT_STEPS = 400
AUDIO_DIM = 64
"""Dimension of the vectors of the audio codec."""
_AUDIO_STEPS = 100
_SPREAD = 0.15
_SQUARES = ((4, 0.87), (8, 0.97), (16, 0.995))
"""(directions, share of the squares in them) of `directed`, as measured on latents."""


def gaussian(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return vectors and codes from one normal distribution: unstructured data, the hardest for a bound."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape.n, shape.d, generator=g), torch.randn(shape.k, shape.d, generator=g)


def clustered(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return vectors around normally distributed codes, at 0.15 of their spread, similar to a trained encoder's."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(shape.k, shape.d, generator=g)
    owner = torch.randint(shape.k, (shape.n,), generator=g)
    return codes[owner] + _SPREAD * torch.randn(shape.n, shape.d, generator=g), codes


def copies(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return `clustered` vectors of an eighth of the codes, and some eight copies of each code in random order."""
    x, distinct = clustered(shape._replace(k=max(1, shape.k // 8)))
    return x, distinct[torch.randint(len(distinct), (shape.k,), generator=torch.Generator().manual_seed(1))]


def directed(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return rotated normal vectors and codes that lie near few directions, as the latents of trained encoders do.

    Four directions have 87 % of the squares, eight 97 % and sixteen 99.5 %.

    Raises:
        BenchError: D is not above 16.
    """
    if shape.d <= _SQUARES[-1][0]:
        raise BenchError(f"data: directed vectors must have D above {_SQUARES[-1][0]}, got D={shape.d}")
    g = torch.Generator().manual_seed(0)
    scale = torch.empty(shape.d)
    first, taken = 0, 0.0
    for last, squares in (*_SQUARES, (shape.d, 1.0)):
        scale[first:last] = ((squares - taken) / (last - first)) ** 0.5
        first, taken = last, squares
    turn = torch.linalg.qr(torch.randn(shape.d, shape.d, generator=g)).Q
    x, codes = (torch.randn(rows, shape.d, generator=g) * scale @ turn for rows in (shape.n, shape.k))
    return x, codes


def latents(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return latents of a VQ-VAE for the shipped Fashion-MNIST images, and codes learned from them.

    The model is trained for 400 steps with K=512 and D=64 or 256.

    Raises:
        BenchError: no model has latents of D dimensions.
    """
    if shape.d not in LATENT_DIMS:
        raise BenchError(f"data: latents have D={' or '.join(map(str, LATENT_DIMS))}, got D={shape.d}")
    name = f"fashion-mnist-latents-{shape.d}-{_LATENT_STEPS}"
    return _drawn(shape, _cached(name, lambda: _train_latents(shape.d, _LATENT_STEPS)))


def audio(shape: Shape, *, stage: int = 1) -> tuple[Tensor, Tensor]:
    """Return what a residual stage of an audio codec quantizes, and codes learned from it.

    The codec of `fastvq demo audio` is trained on the shipped music loops for 100 steps, with 8 stages of 256 codes.
    Vectors of the first stage are the encoder's, those of the third what two stages leave of them.

    Raises:
        BenchError: D is not 64.
    """
    if shape.d != AUDIO_DIM:
        raise BenchError(f"data: vectors of the audio codec have D={AUDIO_DIM}, got D={shape.d}")
    stages = _cached(f"music-loops-stages-{_AUDIO_STEPS}", lambda: _train_audio(_AUDIO_STEPS))
    return _drawn(shape, stages[stage - 1])


def _drawn(shape: Shape, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return N of the vectors and K codes: of k-means up to K=512; else other vectors, too few for k-means."""
    g = torch.Generator().manual_seed(0)
    x = vectors[torch.randint(len(vectors), (shape.n,), generator=g)]
    if shape.k > 512:
        return x, vectors[torch.randint(len(vectors), (shape.k,), generator=g)].clone()
    from fastvq.codebook import kmeans

    sample = vectors[torch.randint(len(vectors), (64 * shape.k,), generator=g)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.ones(len(sample), dtype=torch.bool)
        codes, _ = kmeans(sample, shape.k, iterations=10, mask=mask, seeding="random")
    return x, codes


DATA: dict[str, Callable[[Shape], tuple[Tensor, Tensor]]] = {
    "gaussian": gaussian,
    "clustered": clustered,
    "copies": copies,
    "directed": directed,
    "latents": latents,
    "audio": audio,
    "audio-stage-3": functools.partial(audio, stage=3),
}


def from_file(path: StrPath, n: int | None, k: int | None, d: int | None) -> tuple[Tensor, Tensor]:
    """Return the vectors of an .npy file, (N, D) or (..., D), and K of them as codes.

    Args:
        path: the file.
        n: take the first `n` vectors only; by default all.
        k: number of codes, by default 1024 or, if there are fewer vectors, as many as there are.
        d: if given, the dimension that the vectors must have.

    Raises:
        BenchError: the file is no .npy file of finite floats, or holds other vectors than requested.
    """
    import numpy as np

    try:
        values = read_array(path, np.floating)
    except DataError as error:
        raise BenchError(f"data: {error}") from error
    if values.ndim < 2 or values.size == 0:
        raise BenchError(f"data: {path} must hold vectors, (N, D) or (..., D), got shape {values.shape}")
    values = values.reshape(-1, values.shape[-1])
    if d is not None and values.shape[1] != d:
        raise BenchError(f"d: {path} holds vectors of {values.shape[1]} dimensions, got {d}")
    if n is not None and len(values) < n:
        raise BenchError(f"n: {path} holds {len(values)} vectors, got {n}")
    if k is not None and len(values) < k:
        raise BenchError(f"k: the codes are vectors of {path}, which holds {len(values)}, got {k}")
    with np.errstate(over="ignore"):
        vectors = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    finite = vectors.isfinite().all(1)
    if not finite.all():
        raise BenchError(
            f"data: {path} must hold finite float32 values; {int((~finite).sum())} of {len(finite)} vectors do not,"
            f" the first at row {int((~finite).nonzero()[0])}"
        )
    k = min(DEFAULT_CODES, len(vectors)) if k is None else k
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:k]
    return vectors[:n], vectors[chosen]


def cache_folder() -> Path:
    """Return the folder for cached latents: fastvq/ in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvq"


def _cached(name: str, train: Callable[[], Tensor]) -> Tensor:
    """Return the vectors that `train` returns, read from a file in the cache after the first time."""
    path = cache_folder() / f"{name}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    vectors = train()
    with whole(path) as file:
        torch.save(vectors, file)
    return vectors


def _train_latents(dim: int, steps: int) -> Tensor:
    from fastvq.modalities import ImageConfig

    model, images = _trained(ImageConfig(steps=steps, dim=dim, clip_norm=0.0))
    return _encoded(model, images)


def _train_audio(steps: int) -> Tensor:
    """Return what the first three stages quantize, (3, N, D)."""
    from fastvq.modalities import AudioConfig
    from fastvq.quantizers import ResidualVQ

    model, clips = _trained(AudioConfig(**{**AudioConfig.presets["codec"], "steps": steps}))
    quantizer, vectors = model.bottleneck, _encoded(model, clips)
    assert isinstance(quantizer, ResidualVQ)
    with torch.no_grad():
        codes = [quantizer(vectors[None], n_quantizers=stages)[0][0] for stages in (1, 2)]
    return torch.stack([vectors, *(vectors - quantized for quantized in codes)])


def _trained(config: TrainConfig) -> tuple[VQVAE, Tensor]:
    """Return a model in eval, trained in a temporary folder, and the examples that it learned from."""
    import tempfile

    from fastvq.training import Trainer, load_examples

    config = dataclasses.replace(config, evaluate_every=config.steps, checkpoint_every=config.steps)
    examples = load_examples(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, examples, Path(folder) / "run")
        trainer.fit(progress=False)
    return trainer.model.eval(), examples.train


def _encoded(model: VQVAE, examples: Tensor) -> Tensor:
    """Return the encoder's vectors of all examples, (N, D)."""
    from fastvq.data.examples import to_float

    with torch.no_grad():
        grids = [model.encoder(to_float(chunk)) for chunk in examples.split(500)]
    return torch.cat([grid.flatten(2).transpose(1, 2).flatten(0, 1) for grid in grids])
