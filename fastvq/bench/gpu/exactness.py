"""Indices of the kernels, compared with the definition, which the device itself computes in float64."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fastvq
from fastvq.backends import reference
from fastvq.bench.data import DATA, Shape
from fastvq.bench.exact import nearest

from .step import Context

HALF = (torch.float16, torch.bfloat16)
_KINDS = ("clustered", "gaussian", "copies")
Search = Callable[..., Tensor]


def adversarial_triton(context: Context) -> None:
    """Search the adversarial set by Triton."""
    _adversarial(context, "triton")


def adversarial_cuda(context: Context) -> None:
    """Search the adversarial set by the CUDA kernels."""
    _adversarial(context, "native")


def full_triton(context: Context) -> None:
    """Search at full size by Triton."""
    _full_size(context, "triton")


def full_cuda(context: Context) -> None:
    """Search at full size by the CUDA kernels."""
    _full_size(context, "native")


def load_cases(root: Path) -> ModuleType:
    """Return tests/cases.py of the source tree, which has the adversarial set."""
    spec = importlib.util.spec_from_file_location("fastvq_test_cases", root / "tests" / "cases.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{root}/tests/cases.py can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _adversarial(context: Context, backend: str) -> None:
    cases, device = load_cases(context.root), context.device
    data = cases.ADVERSARIAL | cases.COPIES
    names = context.sizes.data or tuple(data)

    def vectors(name: str, shape: Shape) -> tuple[Tensor, Tensor]:
        x, codebook = data[name](*shape, cases.generator())
        return x.to(device), codebook.to(device)

    def searches(name: str, *dtypes: torch.dtype) -> Iterator[tuple[Search, Search, Tensor, Tensor]]:
        for shape in context.sizes.adversarial:
            x, codebook = vectors(name, shape)
            for dtype in dtypes:
                for metric in cases.METRICS:
                    own, defined = (partial(search, metric=metric) for search in (fastvq.search, reference.search))
                    yield own, defined, x.to(dtype), codebook.to(dtype)

    def stacks(name: str) -> Iterator[tuple[Search, Search, Tensor, Tensor]]:
        for shape in context.sizes.adversarial[::2]:
            x, codebook = vectors(name, shape)
            codebooks = torch.stack([codebook * 0.5**stage for stage in range(context.sizes.stages)])
            yield fastvq.residual_search, reference.residual_search, x, codebooks

    shape = context.sizes.adversarial[0]
    context.case(
        partial(_same_reference, context, [data[name](*shape, cases.generator()) for name in names]),
        what="the definition on this device as on the CPU",
    )
    for name in names:
        context.case(partial(_agreement, backend, searches(name, torch.float32)), what="search", data=name)
    for name in names:
        context.case(partial(_agreement, backend, stacks(name)), what="residual_search", data=name)
    for name in names:
        context.case(partial(_agreement, backend, searches(name, *HALF)), what="search, 16 bits", data=name)
    for name, made in cases.FLOAT64_ONLY.items():
        if not context.sizes.data:
            x, codebook = (t.to(device) for t in made(*shape, cases.generator()))
            problem = (fastvq.search, reference.search, x, codebook)
            context.case(partial(_agreement, backend, iter([problem])), what="search, float64", data=name)


def _same_reference(context: Context, problems: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    wrong = rows = 0
    for x, codebook in problems:
        on_device = reference.search(x.to(context.device), codebook.to(context.device)).cpu()
        wrong, rows = wrong + int((on_device != reference.search(x, codebook)).sum()), rows + len(x)
    return {"searches": len(problems), "rows": rows, "wrong": wrong}


def _agreement(backend: str, problems: Iterator[tuple[Search, Search, Tensor, Tensor]]) -> dict[str, Any]:
    """Return how many indices of the backend differ from the definition's, and where the first one is."""
    wrong = rows = searches = 0
    first = None
    for own, defined, x, codebook in problems:
        with fastvq.use_backend(backend):
            found = own(x, codebook)
        different = found != defined(x, codebook)
        count = int(different.sum())
        if count and first is None:
            place = different.nonzero()[0].tolist()
            first = f"{x.dtype} {tuple(x.shape)}, codes {tuple(codebook.shape)}, at {place}"
        wrong, rows, searches = wrong + count, rows + found.numel(), searches + 1
    return {"searches": searches, "rows": rows, "wrong": wrong} | ({"first": first} if first else {})


def _full_size(context: Context, backend: str) -> None:
    for shape in context.sizes.exact:
        for kind in _KINDS:
            x, codebook = (t.to(context.device) for t in DATA[kind](shape))
            # bfloat16 codes collide, so that ties by equal codes are checked here too.
            dtypes = (torch.float32, torch.bfloat16)
            for dtype in dtypes:
                context.case(
                    partial(_all_rows, backend, x.to(dtype), codebook.to(dtype)),
                    what="search",
                    **shape._asdict(),
                    data=kind,
                    dtype=str(dtype).removeprefix("torch."),
                )


def _all_rows(backend: str, x: Tensor, codebook: Tensor) -> dict[str, Any]:
    with fastvq.use_backend(backend):
        found = fastvq.search(x, codebook)
    return {"rows": len(x), "wrong": int((found != nearest(x, codebook)).sum())}
