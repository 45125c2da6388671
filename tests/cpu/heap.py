"""Growth of the C heap over repeated calls of the ops and over training steps of the layers.

    python -m tests.cpu.heap growth ops|layers    prints the bytes by which one call of each grows the heap, as JSON
    python -m tests.cpu.heap leaks                has LeakSanitizer, preloaded, report what CALLS calls of each op lose

Python's own allocator keeps small objects in arenas of its own: the measurements see what torch and the library leave.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import fastvq

from .. import every
from ..op_samples import sample_inputs

WARM_UP, CALLS, REPEATS = 8, 20, 10


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def live_bytes() -> int:
    """Return the bytes that malloc has handed out, in all arenas."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def op_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    for number, (name, arguments, options) in enumerate(sample_inputs()):
        yield f"{name}-{number}", partial(getattr(fastvq.ops, name), *arguments, **options)


def layers() -> Iterator[tuple[str, torch.nn.Module, torch.Tensor]]:
    """Yield (name, layer, a batch for it) of every public quantizer and option."""
    for name in every.QUANTIZERS:
        yield name, every.make(name), every.batch_for(name)
    x = torch.randn(4, 16, 6)
    encoder, decoder = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    yield "BinaryMapper", fastvq.BinaryMapper(6), x
    yield "EvoLFQ", fastvq.EvoLFQ(encoder, decoder, dim=6, entropy_loss_weight=0.1), x
    hierarchical = fastvq.HierarchicalVQ(dim=6, codebook_size=12, scales=(1, 4, 16), channel_first=False)
    yield "HierarchicalVQ", hierarchical, x
    yield "StridedResidualVQ", fastvq.StridedResidualVQ(6, 12, (4, 2, 1), 4), x
    yield "Sequential", fastvq.Sequential(encoder, fastvq.VectorQuantize(6, 12), decoder), x


def training_steps() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (name, a training step between two linear maps) of every layer of `layers`."""
    for name, layer, x in layers():
        before = torch.nn.Linear(x.shape[-1], x.shape[-1])
        optimizer = torch.optim.Adam([*before.parameters(), *layer.parameters()], lr=1e-3)

        def step(layer=layer, before=before, x=x, optimizer=optimizer) -> None:
            results = every.tensors(layer(before(x)))
            if terms := [
                r.square().mean() for r in results if r.requires_grad
            ]:  # random projections give indices alone
                sum(terms).backward()
            optimizer.step()
            optimizer.zero_grad()

        yield name, step


def growth(call: Callable[[], Any]) -> float:
    """Return the bytes by which a call grows the heap: the least of some repeats, as caches grow only now and then."""
    for _ in range(WARM_UP):
        call()
    least = float("inf")
    for _ in range(REPEATS):
        before = live_bytes()
        for _ in range(CALLS):
            call()
        least = min(least, (live_bytes() - before) / CALLS)
        if least <= 0:
            break
    return least


def report_leaks() -> None:
    """Let LeakSanitizer report what `CALLS` calls of each op have allocated and lost, and nothing from before."""
    sanitizer = ctypes.CDLL(None)
    for _, call in op_calls():
        call()
    gc.collect()
    sanitizer.__lsan_enable()
    for _, call in op_calls():
        for _ in range(CALLS):
            call()
    sanitizer.__lsan_disable()
    gc.collect()
    sanitizer.__lsan_do_recoverable_leak_check()


def main(mode: str, kind: str = "") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.freeze()  # what the imports have made needn't be walked by each collection
    for _ in range(20 * WARM_UP):
        fastvq.search(torch.ones(2, 2), torch.ones(2, 2))
    if mode == "leaks":
        report_leaks()
        return
    if kind == "layers":
        print(json.dumps({name: growth(step) for name, step in training_steps()}))
        return
    grown = {}
    served = {"native": contextlib.nullcontext(), "torch": fastvq.use_backend("torch")}  # by itself the CPU has native
    for backend, context in served.items():
        with context:
            grown |= {f"{backend} {name}": growth(call) for name, call in op_calls()}
    print(json.dumps(grown))


if __name__ == "__main__":
    main(*sys.argv[1:])
