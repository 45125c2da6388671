"""Shapes and vectors of the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.data.arrays import read_array
from fastvq.errors import BenchError, DataError
from fastvq.files import StrPath, whole


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
    """Return latents of a VQ-VAE for the shipped Fashion-MNIST images, and codes learned from them by k-means.

    The model is trained for 400 steps with K=512 and D=64 or 256; its latents are cached on disk. For K up to 512 the
    codes are those of k-means on 64 K latents; a larger K takes random latents as codes, since there are too few for
    k-means.

    Raises:
        BenchError: no model has latents of D dimensions.
    """
    if shape.d not in LATENT_DIMS:
        raise BenchError(f"data: latents have D={' or '.join(map(str, LATENT_DIMS))}, got D={shape.d}")
    vectors = _all_latents(shape.d)
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
    "directed": directed,
    "latents": latents,
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


def _all_latents(dim: int) -> Tensor:
    path = cache_folder() / f"fashion-mnist-latents-{dim}-{_LATENT_STEPS}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    vectors = _train_latents(dim, _LATENT_STEPS)
    with whole(path) as file:
        torch.save(vectors, file)
    return vectors


def _train_latents(dim: int, steps: int) -> Tensor:
    import tempfile

    from fastvq.data.examples import to_float
    from fastvq.modalities import ImageConfig
    from fastvq.training import Trainer, load_examples

    config = ImageConfig(steps=steps, dim=dim, clip_norm=0.0, evaluate_every=steps, checkpoint_every=steps)
    examples = load_examples(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, examples, Path(folder) / "run")
        trainer.fit(progress=False)
    model = trainer.model.eval()
    with torch.no_grad():
        grids = [model.encoder(to_float(chunk)) for chunk in examples.train.split(500)]
    return torch.cat([grid.flatten(2).transpose(1, 2).reshape(-1, dim) for grid in grids])
