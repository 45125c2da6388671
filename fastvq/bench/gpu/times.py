"""Times of the ops and of a training step beside other methods, each result checked first."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvq
from fastvq.backends import select
from fastvq.bench.data import DATA, Shape
from fastvq.bench.exact import nearest
from fastvq.bench.measure import interleave
from fastvq.bench.peers import GPU_CONTESTANTS, PRODUCT, Contestant
from fastvq.bench.training import PEER

from .step import Context, said

OWN = ("triton", "native")
"""Backends of fastvq that are timed."""
DECAY, EPS = 0.99, 1e-5
ITERATION = "k-means iteration, float16"
LARGEST_MATRIX = 4 << 30
"""Bytes of the largest N x K matrix of a peer; more rows are taken in turn."""
CACHES = 4
"""Rotated inputs take this many times the cache of the device together, so that none comes from it."""
MOST_INPUTS = 32
SLOW = 8.0
"""Times the fastest, beyond which a contestant is measured three times only."""
LONG_SECONDS = 0.02
"""A call that takes longer isn't captured in a graph: the gaps between its launches are nothing beside it."""

Call = Callable[..., Any]
Inputs = Sequence[tuple[Tensor, ...]]
Factories = dict[str, Callable[[], Call] | str]
"""Builder of a contestant, or the reason why it does not run."""


def measure(context: Context) -> None:
    """Time searches, training steps, residual searches, statistics and updates, in this order."""
    cases: list[tuple[Callable[..., dict[str, Any]], str, Shape, str]] = []
    for timed, what, kind in (
        (search_times, "search", "clustered"),
        (step_times, "training step", "clustered"),
        (residual_times, "residual_search", "clustered"),
        (accumulate_times, "accumulate", "clustered"),
        (ema_times, "ema_update_", "clustered"),
        (search_times, "search", "copies"),
        (search_times, "search", "gaussian"),
    ):
        cases += [(timed, what, shape, kind) for shape in context.sizes.timed]
    cases.append((iteration_times, ITERATION, context.sizes.iteration, "clustered"))
    for timed, what, shape, kind in cases:
        context.case(functools.partial(timed, context, shape, kind), what=what, **shape._asdict(), data=kind)


def search_times(context: Context, shape: Shape, kind: str) -> dict[str, Any]:
    """Time a search."""
    x, codebook = vectors(context, shape, kind)
    expected = _expected(context.device, shape, kind)
    operations = functools.partial(scores_argmin, codebook=codebook)
    compiled = functools.partial(compiled_argmin(), codebook=codebook)
    factories: Factories = {
        f"fastvq {name}": served(name, "search", context, functools.partial(fastvq.search, codebook=codebook))
        for name in OWN
    }
    factories |= {
        "addmm + argmin, compiled": lambda: at_precision("highest", in_turn(compiled, shape.k)),
        "addmm + argmin, compiled, tf32": lambda: at_precision("high", in_turn(compiled, shape.k)),
        "addmm + argmin": lambda: in_turn(operations, shape.k),
        "cdist + argmin": lambda: in_turn(lambda part: torch.cdist(part, codebook).argmin(1), shape.k),
        PRODUCT: lambda: at_precision("highest", bare_product(shape, codebook)),
        f"{PRODUCT}, tf32": lambda: at_precision("high", bare_product(shape, codebook)),
    }
    for peer in GPU_CONTESTANTS:
        if not peer.name.startswith("fastvq"):
            factories[peer.name] = peer.missing() or functools.partial(_of_peer, peer, codebook)
    return compare(context, shape, factories, [(part,) for part in rotated(x)], functools.partial(_wrong, expected))


def _of_peer(peer: Contestant, codebook: Tensor) -> Call:
    return lambda x: peer.prepare(x, codebook)()


def _wrong(expected: Tensor, found: Tensor) -> int:
    """Return the number of rows with an index, of any stage, that is not the expected one."""
    return int((found != expected).view(len(expected), -1).any(1).sum())


def residual_times(context: Context, shape: Shape, kind: str) -> dict[str, Any]:
    """Time a residual search."""
    if shape.n * shape.k * shape.d > context.sizes.slowest:
        return {"not_run": "left out at this size"}
    x, codebook = vectors(context, shape, kind)
    codebooks = torch.stack([codebook * 0.5**stage for stage in range(context.sizes.stages)])
    own = functools.partial(fastvq.residual_search, codebooks=codebooks)
    factories: Factories = {f"fastvq {name}": served(name, "residual_search", context, own) for name in OWN}
    factories |= {
        "addmm + argmin a stage, compiled": lambda: functools.partial(by_stages, compiled_argmin(), codebooks),
        "addmm + argmin a stage": lambda: functools.partial(by_stages, scores_argmin, codebooks),
    }
    wrong = functools.partial(_wrong, by_stages(nearest, codebooks, x))
    found = compare(context, shape, factories, [(part,) for part in rotated(x)], wrong)
    return {"stages": context.sizes.stages, **found}


def step_times(context: Context, shape: Shape, kind: str) -> dict[str, Any]:
    """Time forward, backward and codebook update of a layer."""
    x, codebook = vectors(context, shape, kind)

    def of_module(name: str) -> Call:
        module = importlib.import_module(name)
        layer = module.VectorQuantize(dim=shape.d, codebook_size=shape.k, decay=DECAY).to(context.device)
        with torch.no_grad():
            layer.codebook = codebook
        return training_step(layer)

    def of_operations(search: Call) -> Call:
        return training_step(PlainLayer(codebook, search))

    factories: Factories = {
        "fastvq": functools.partial(of_module, "fastvq"),
        "torch operations, compiled search": functools.partial(of_operations, compiled_argmin()),
        "torch operations": functools.partial(of_operations, scores_argmin),
        PEER: functools.partial(of_module, PEER) if importlib.util.find_spec(PEER) else f"{PEER} isn't installed",
    }
    if shape.n > rows_at_once(shape.k):
        factories |= {name: "its N x K matrix is too large" for name in factories if name != "fastvq"}
    inputs = [(part[None].requires_grad_(),) for part in rotated(x)]
    return compare(context, shape, factories, inputs, functools.partial(_wrong, _expected(context.device, shape, kind)))


def accumulate_times(context: Context, shape: Shape, kind: str) -> dict[str, Any]:
    """Time the counts and sums of rows by code."""
    x, _ = vectors(context, shape, kind)
    inputs = [(part, torch.randint(shape.k, (shape.n,), device=x.device)) for part in rotated(x)]
    counts, sums = added(*inputs[0], shape.k, torch.float64)

    def wrong(found: tuple[Tensor, Tensor]) -> int:
        """Count the codes with another count, or with a sum off by more than float32 sums in any order."""
        off = ((found[1] - sums).abs() > 1e-4 * sums.abs().max()).any(1)
        return int((off | (found[0] != counts)).sum())

    own = functools.partial(fastvq.accumulate, codebook_size=shape.k)
    factories: Factories = {f"fastvq {name}": served(name, "accumulate", context, own) for name in OWN}
    factories["index_add_"] = lambda: functools.partial(added, size=shape.k, dtype=torch.float32)
    return compare(context, shape, factories, inputs, wrong)


def ema_times(context: Context, shape: Shape, kind: str) -> dict[str, Any]:
    """Time the moving averages and the codebook from them."""
    _, codebook = vectors(context, shape, kind)
    counts = torch.randint(1, 50, (shape.k,), device=codebook.device).float()
    state = (codebook, torch.ones_like(counts), codebook, counts, counts[:, None] * codebook)
    expected = averaged(*(t.double() for t in state))

    def wrong(found: Tensor) -> int:
        return int(((found - expected).abs() > 1e-5 * expected.abs().max()).any(1).sum())

    def updated(update: Call, codes: Tensor, *rest: Tensor) -> Tensor:
        update(codes, *rest, decay=DECAY, eps=EPS)
        return codes

    factories: Factories = {
        f"fastvq {name}": served(name, "ema_update_", context, functools.partial(updated, fastvq.ema_update_))
        for name in OWN
    }
    factories["torch operations"] = lambda: averaged
    inputs = [tuple(t.clone() for t in state) for _ in rotated(codebook)]
    return compare(context, shape, factories, inputs, wrong)


def iteration_times(context: Context, shape: Shape, kind: str) -> dict[str, Any]:
    """Time a search and the sums of an iteration of k-means, on float16, as others have published."""
    x, codebook = (t.half() for t in vectors(context, shape, kind))
    expected = nearest(x, codebook)

    def iteration(rows: Tensor) -> Tensor:
        indices = fastvq.search(rows, codebook)
        fastvq.accumulate(rows, indices, shape.k)
        return indices

    factories: Factories = {f"fastvq {name}": served(name, "search", context, iteration) for name in OWN}
    return compare(context, shape, factories, [(part,) for part in rotated(x)], functools.partial(_wrong, expected))


def compare(
    context: Context, shape: Shape, factories: Factories, inputs: Inputs, wrong: Callable[[Any], int]
) -> dict[str, Any]:
    """Return a record for each contestant: seconds and wrong rows, or why it did not run.

    Each is checked on the first of the inputs, which it gets as a copy, before any is timed.
    """
    records: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    for name, made in factories.items():
        record: dict[str, Any] = {"name": name}
        records.append(record)
        if isinstance(made, str):
            record["not_run"] = made
            continue
        try:
            call = made()
            result = call(*(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs[0]))
            if result is not None:
                record["wrong"] = wrong(result)
            calls[name] = call
        except Exception as error:
            record["error"] = said(error)
            if context.device_is_lost():
                raise
    long = shape.n * shape.k * shape.d > context.sizes.slowest
    found = seconds_of_each(calls, inputs, budget=0.0 if long else context.sizes.budget)
    return {"inputs": len(inputs), "contestants": [record | found.get(record["name"], {}) for record in records]}


def seconds_of_each(calls: dict[str, Call], inputs: Inputs, *, budget: float) -> dict[str, dict[str, Any]]:
    """Return median seconds of each call as it is made in a program, and of its launches alone, replayed as a graph."""
    device = inputs[0][0].device
    turns: dict[str, Callable[[], Any]] = {
        name: functools.partial(_next, call, itertools.cycle(inputs)) for name, call in calls.items()
    }
    taken = interleave(turns, budget=budget, device=device, slow=SLOW)
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": statistics.median(times), "least": min(times), "runs": len(times)}
        for name, times in taken.items()
    }
    replays = {}
    for name, call in calls.items():
        if device.type == "cuda" and found[name]["seconds"] < LONG_SECONDS:
            try:
                replays[name] = captured(call, inputs)
            except Exception as error:
                found[name]["graph_error"] = said(error)
    for name, times in interleave(replays, budget=budget, device=device, slow=SLOW).items():
        found[name]["graph_seconds"] = statistics.median(times) / len(inputs)
    return found


def _next(call: Call, inputs: Iterator[tuple[Tensor, ...]]) -> Any:
    return call(*next(inputs))


def captured(call: Call, inputs: Inputs) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the call on each of the inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture needs what a first call on another stream allocates
        call(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in inputs:
            call(*each)
    return graph.replay


def vectors(context: Context, shape: Shape, kind: str) -> tuple[Tensor, Tensor]:
    """Return x and a codebook on the device, which nothing may change: large ones take seconds and are kept."""
    return _vectors(context.device, shape, kind)


@functools.lru_cache(maxsize=16)
def _vectors(device: torch.device, shape: Shape, kind: str) -> tuple[Tensor, Tensor]:
    x, codebook = DATA[kind](shape)
    return x.to(device), codebook.to(device)


@functools.lru_cache(maxsize=16)
def _expected(device: torch.device, shape: Shape, kind: str) -> Tensor:
    return nearest(*_vectors(device, shape, kind))


def rotated(x: Tensor) -> list[Tensor]:
    """Return x and permutations of its rows that together exceed the device's cache."""
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size if x.device.type == "cuda" else 0
    count = max(2, min(MOST_INPUTS, math.ceil(CACHES * cache / (x.numel() * x.element_size()))))
    return [x, *(x[torch.randperm(len(x), device=x.device)] for _ in range(count - 1))]


def served(backend: str, op: str, context: Context, call: Call) -> Callable[[], Call] | str:
    """Return how `call` is served by a backend, or why it can't be; without a request where that is the default."""
    if reason := select.BACKENDS[backend].why_not(op, context.device, torch.float32):
        return reason
    if select.choose(op, context.device) == backend:
        return lambda: call

    def requested(*arguments: Any) -> Any:
        with fastvq.use_backend(backend):
            return call(*arguments)

    return lambda: requested


def rows_at_once(codes: int) -> int:
    """Return the rows whose matrix of distances is not larger than LARGEST_MATRIX."""
    return max(1, LARGEST_MATRIX // (4 * codes))


def in_turn(search: Call, codes: int) -> Call:
    """Return a search that takes as many rows at once as `rows_at_once` allows."""
    rows = rows_at_once(codes)
    return lambda x: search(x) if len(x) <= rows else torch.cat([search(part) for part in x.split(rows)])


def scores_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """Return the argmin of |e|^2 - 2 <x, e>."""
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


@functools.cache
def compiled_argmin() -> Call:
    """Return `scores_argmin` compiled."""
    return torch.compile(scores_argmin, dynamic=False)


def at_precision(precision: str, call: Call) -> Call:
    """Return a call whose float32 products have a precision of `torch.set_float32_matmul_precision`."""

    def run(*arguments: Any) -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return call(*arguments)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def bare_product(shape: Shape, codebook: Tensor) -> Call:
    """Return the product of x and the codebook into a matrix that is there already."""
    rows = min(shape.n, rows_at_once(shape.k))
    out = codebook.new_empty(rows, shape.k)

    def run(x: Tensor) -> None:
        for part in x.split(rows):
            torch.mm(part, codebook.T, out=out[: len(part)])

    return run


def by_stages(search: Call, codebooks: Tensor, x: Tensor) -> Tensor:
    """Return the indices of a residual search of one search a stage."""
    found = []
    for codebook in codebooks:
        indices = search(x, codebook)
        x = x - codebook[indices]
        found.append(indices)
    return torch.stack(found, 1)


def added(x: Tensor, indices: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return counts and sums of the rows of each code by `index_add_`."""
    counts, sums = x.new_zeros(size, dtype=dtype), x.new_zeros(size, x.shape[1], dtype=dtype)
    counts.index_add_(0, indices, torch.ones_like(indices, dtype=dtype))
    return counts, sums.index_add_(0, indices, x.to(dtype))


def averaged(codebook: Tensor, size: Tensor, average: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
    """Update moving averages and codebook in place, in torch operations, and return the codebook."""
    size.lerp_(counts, 1 - DECAY)
    average.lerp_(sums, 1 - DECAY)
    total = size.sum()
    smoothed = (size + EPS) / (total + len(size) * EPS) * total
    return codebook.copy_(average / smoothed[:, None])


class PlainLayer(nn.Module):
    """A layer as one writes it in torch operations: no N x K matrix beyond the scores, straight-through, averages."""

    def __init__(self, codebook: Tensor, search: Call) -> None:
        super().__init__()
        self.search = search
        self.codebook, self.average = codebook.clone(), codebook.clone()
        self.size = codebook.new_ones(len(codebook))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.detach().flatten(0, 1)
        indices = self.search(rows, self.codebook)
        codes = F.embedding(indices, self.codebook).view_as(x)
        counts, sums = added(rows, indices, len(self.codebook), torch.float32)
        averaged(self.codebook, self.size, self.average, counts, sums)
        return x + (codes - x).detach(), indices.view(x.shape[:2]), F.mse_loss(x, codes)


def training_step(layer: nn.Module) -> Call:
    """Return a training step of a layer, which returns the indices that it chose."""

    def step(x: Tensor) -> Tensor:
        quantized, indices, loss = layer(x)
        x.grad = None
        (quantized.sum() + loss.sum()).backward()
        return indices[0]

    return step
