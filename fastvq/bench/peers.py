"""Contestants of the benchmarks, each with the reason if it cannot run a case."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvq
from fastvq.backends import native
from fastvq.backends import select as backends

from .data import Shape

LARGEST_MATRIX = 3 << 30
"""Largest N x K matrix, in bytes, that a contestant may materialize."""
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Contestant:
    """A search method.

    `prepare(x, codebook)` returns the timed function: it returns indices (N,), or None for a bare product.
    """

    name: str
    prepare: Callable[[Tensor, Tensor], Callable[[], Tensor | None]]
    missing: Callable[[], str] = lambda: ""
    whole_matrix: bool = False
    least_dim: int = 1
    float32_only: bool = True
    is_search: bool = True

    def why_not(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
        """Return the reason why it cannot run this case; empty if it can."""
        if self.whole_matrix and 4 * shape.n * shape.k > LARGEST_MATRIX:
            return f"its N x K matrix would take {4e-9 * shape.n * shape.k:.1f} GB"
        if shape.d < self.least_dim:
            return f"needs at least {self.least_dim} dimensions"
        if self.float32_only and dtype != torch.float32:
            return f"doesn't take {dtype}".replace("torch.", "")
        if self.name.startswith("fastvq"):
            return backends.BACKENDS[self.name.split()[1]].why_not("search", device, dtype)
        if device.type != "cpu" and self.name in CPU_ONLY:
            return f"runs on cpu, not on {device.type}"
        return self.missing()


def _no_super_kmeans() -> str:
    if reason := _package("faiss")():
        return reason
    faiss: Any = importlib.import_module("faiss")
    return "" if hasattr(faiss, "super_kmeans_assign_iteration") else f"faiss {faiss.__version__} has no SuperKMeans"


def _package(module: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(module) else f"{module.split('.')[0]} isn't installed"


def _fastvq(backend: str, x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with fastvq.use_backend(backend):
            return fastvq.search(x, codebook)

    return run


def _addmm(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """Return the search of a careful user: |e|^2 - 2 <x, e> in chunks of rows."""
    rows = max(1, min(1024, _CHUNK // len(codebook)))

    def run() -> Tensor:
        norms = codebook.square().sum(1)
        return torch.cat([torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in x.split(rows)])

    return run


def _cdist(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.cdist(x, codebook).argmin(1)


def _plain(x: Tensor, codebook: Tensor) -> Tensor:
    return (codebook.square().sum(1) - 2 * x @ codebook.T).argmin(1)


def _compiled(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(_plain, dynamic=False)
    return lambda: compiled(x, codebook)


def _faiss(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors, codes = x.numpy(), codebook.numpy()

    def run() -> Tensor:
        index = faiss.IndexFlatL2(codes.shape[1])
        index.add(codes)  # the codebook changes at every training step
        return torch.from_numpy(index.search(vectors, 1)[1][:, 0])

    return run


_MOVED = 0.1  # of the mean distance between rows and codes


def _super_kmeans(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """Return the pass that faiss's SuperKMeans makes over the rows in each iteration but the first.

    It begins with a code for each row, here the nearest one before all codes moved by a tenth of the mean distance, and
    drops codes by a statistical test, so that it may miss the nearest. Rows and codes are rotated beforehand, once for
    all iterations, of which some have adapted the number of dimensions that are not tested.
    """
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    dim = x.shape[1]
    turn = faiss.RandomRotationMatrix(dim, dim)
    turn.init(0)
    rows, codes = (torch.from_numpy(turn.apply(vectors.numpy())) for vectors in (x, codebook))
    distance = (rows - codes[fastvq.search(rows, codes)]).square().sum(1).sqrt().mean()
    noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    previous = fastvq.search(rows, codes + _MOVED * dim**-0.5 * distance * noise)
    settings = faiss.SuperKMeansParameters()
    thresholds = faiss.vector_to_array(faiss.precompute_ad_thresholds(dim, settings.ad_epsilon_factor / dim))
    plain = max(settings.d_prime_min, int(dim * settings.d_prime_fraction))

    def run() -> Tensor:
        found = previous.int().numpy()
        limits = (rows - F.embedding(previous, codes)).square().sum(1).numpy()
        counts[:] = faiss.super_kmeans_assign_iteration(
            rows.numpy(), codes.numpy(), limits, found, min(plain, dim // 2), thresholds, settings
        )
        return torch.from_numpy(found).long()

    counts = [1, 0]  # pairs of a row and a code, and those that the first test drops
    for _ in range(_ADAPTING):
        run()
        dropped = counts[1] / counts[0]
        up, down = dropped < settings.pruning_target_low, dropped > settings.pruning_target_high
        plain = max(settings.d_prime_min, round(plain * (1 + (up - down) * settings.d_prime_adjust)))
    return run


_ADAPTING = 4


def _sklearn(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    vectors, codes = x.numpy(), codebook.numpy()

    def run() -> Tensor:
        with threadpool_limits(torch.get_num_threads()):
            return torch.from_numpy(pairwise_distances_argmin(vectors, codes))

    return run


def _product(x: Tensor, codebook: Tensor) -> Callable[[], None]:
    out = x.new_empty(len(x), len(codebook))

    def run() -> None:
        torch.mm(x, codebook.T, out=out)

    return run


def _flash_kmeans(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from flash_kmeans.assign_euclid_triton import (
        euclid_assign_triton,
    )

    return lambda: euclid_assign_triton(x[None], codebook[None], x.float().square().sum(1)[None])[0].long()


def _cuvs(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from cuvs.neighbors import brute_force

    def run() -> Tensor:
        index = brute_force.build(codebook, metric="sqeuclidean")
        return torch.as_tensor(brute_force.search(index, x, 1)[1], device=x.device)[:, 0].long()

    return run


NATIVE, TRITON, PRODUCT = "fastvq native", "fastvq triton", "torch.mm alone"
CPU_ONLY = ("faiss-cpu", "faiss SuperKMeans", "scikit-learn")
CONTESTANTS = [
    Contestant(NATIVE, functools.partial(_fastvq, "native"), float32_only=False),
    Contestant("fastvq torch", functools.partial(_fastvq, "torch"), float32_only=False),
    Contestant("faiss-cpu", _faiss, _package("faiss")),
    Contestant("faiss SuperKMeans", _super_kmeans, _no_super_kmeans, least_dim=32),
    Contestant("addmm + argmin", _addmm, float32_only=False),
    Contestant("cdist + argmin", _cdist, whole_matrix=True),
    Contestant("scikit-learn", _sklearn, _package("sklearn")),
    Contestant("torch.compile", _compiled, whole_matrix=True, float32_only=False),
    Contestant(PRODUCT, _product, whole_matrix=True, float32_only=False, is_search=False),
]
GPU_CONTESTANTS = [
    Contestant(TRITON, functools.partial(_fastvq, "triton"), float32_only=False),
    Contestant("flash-kmeans", _flash_kmeans, _package("flash_kmeans"), float32_only=False),
    Contestant("cuVS", _cuvs, _package("cuvs")),
]
PEERS = [c.name for c in CONTESTANTS if c.is_search and not c.name.startswith("fastvq")]


def contestants(device: torch.device) -> list[Contestant]:
    """Return the contestants for a kind of device."""
    return CONTESTANTS + (GPU_CONTESTANTS if device.type == "cuda" else [])


def instruction_set() -> str:
    """Return the instruction set of the native backend, or "none"."""
    return native.instruction_set() or "none"
