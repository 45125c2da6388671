"""Contestants of the benchmarks, each with the reason if it cannot run a case."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
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
    float32_only: bool = True
    is_search: bool = True

    def why_not(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
        """Return the reason why it cannot run this case; empty if it can."""
        if self.whole_matrix and 4 * shape.n * shape.k > LARGEST_MATRIX:
            return f"its N x K matrix would take {4e-9 * shape.n * shape.k:.1f} GB"
        if self.float32_only and dtype != torch.float32:
            return f"doesn't take {dtype}".replace("torch.", "")
        if self.name.startswith("fastvq"):
            return backends.BACKENDS[self.name.split()[1]].why_not("search", device, dtype)
        if device.type != "cpu" and self.name in CPU_ONLY:
            return f"runs on cpu, not on {device.type}"
        return self.missing()


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
CPU_ONLY = ("faiss-cpu", "scikit-learn")
CONTESTANTS = [
    Contestant(NATIVE, functools.partial(_fastvq, "native"), float32_only=False),
    Contestant("fastvq torch", functools.partial(_fastvq, "torch"), float32_only=False),
    Contestant("faiss-cpu", _faiss, _package("faiss")),
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
