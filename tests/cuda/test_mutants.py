"""Sanitizers find nothing in the kernels, and each of some mistakes is found by the layer that is there for it.

All mistakes are compiled into one copy of the kernels, and none or one of them is made when it runs.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastvq.backends import reference

from ..cases import ADVERSARIAL, generator
from . import emulation
from .emulation import CSRC, ORDERS, Call, Failed, run

Case = tuple[Call, tuple[Tensor, ...]]
"""A call and what it should return first."""


def search(path: str, data: str, *shape: int) -> Callable[[], Case]:
    def case() -> Case:
        x, codebook = ADVERSARIAL[data](*shape, generator())
        return emulation.search(x, codebook, path=path), (reference.search(x, codebook),)

    return case


def heads(path: str, data: str, *shape: int) -> Callable[[], Case]:
    """Four heads, and so no reason to share the codes out among blocks."""

    def case() -> Case:
        x, codebook = (torch.stack([t] * 4) for t in ADVERSARIAL[data](*shape, generator()))
        return emulation.search(x, codebook, path=path), (reference.search(x, codebook),)

    return case


def overflowing() -> Case:
    """Finite rows whose distance from the center isn't."""
    codebook = -2.5e38 + 2e37 * torch.randn(100, 8, generator=generator())
    x = 2.5e38 * (1 - 2 * torch.randint(0, 2, (70, 8), generator=generator(1)))
    return emulation.search(x, codebook, path="matrix"), (reference.search(x, codebook),)


def two_heads() -> Case:
    pairs = [ADVERSARIAL[name](9, 60, 270, generator()) for name in ("gaussian", "vectors_far_from_codes")]
    x, codebook = (torch.stack(t) for t in zip(*pairs, strict=True))
    return emulation.search(x, codebook, path="matrix"), (reference.search(x, codebook),)


def residual(n: int, q: int, k: int, d: int) -> Callable[[], Case]:
    def case() -> Case:
        g = generator()
        x, codebooks = torch.randn(n, d, generator=g), torch.randn(q, k, d, generator=g)
        return emulation.residual_search(x, codebooks), (reference.residual_search(x, codebooks),)

    return case


def accumulate(n: int, k: int, d: int) -> Callable[[], Case]:
    def case() -> Case:
        x, indices = torch.randn(n, d, generator=generator()), torch.randint(-1, k, (n,), generator=generator(1))
        return emulation.accumulate(x, indices, k), reference.accumulate(x, indices, k)

    return case


def min_distance(n: int, m: int, d: int) -> Callable[[], Case]:
    def case() -> Case:
        g = generator()
        distances = 2 * d * torch.rand(n, generator=g)
        x, codes = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
        expected = distances.clone()
        reference.min_distance_(expected, x, codes)
        return emulation.min_distance(distances, x, codes), (expected,)

    return case


def ema_update() -> Case:
    tensors = [torch.rand(*shape, generator=generator()) for shape in [(20, 3), (20,), (20, 3), (20,), (20, 3)]]
    call = emulation.ema_update(*tensors, decay=0.9, eps=1e-5)
    return call, ()


class Mutant(NamedTuple):
    name: str
    case: Callable[[], Case]
    file: str
    right: str
    mistaken: str
    """The mistaken code; MUTANT in it is true if the mistake is made."""
    layer: str = "indices"
    """The check that finds it: "indices" that differ from the specification's in some order of the threads, the
    "emulator" itself, or a sanitizer, "address" or "thread"."""
    says: str = ""
    processors: int = 1


MUTANTS = (
    Mutant(
        "a tile is overwritten before all have read it", search("cores", "gaussian", 9, 1200, 8),
        "scan_cores.cuh", "    }\n    __syncthreads();", "    }\n    if (!MUTANT) __syncthreads();",
    ),
    Mutant(
        "a tile is read before all have brought it", search("matrix", "gaussian", 9, 700, 20),
        "scan_matrix.cuh", "    __syncthreads();\n    bring(", "    if (!MUTANT) __syncthreads();\n    bring(",
    ),
    Mutant(
        "sums are read before they are written", accumulate(1200, 9, 2),
        "accumulate.cuh", "  __syncthreads();\n  uint32_t before", "  if (!MUTANT) __syncthreads();\n  uint32_t before",
        "address", "AddressSanitizer",
    ),
    Mutant(
        "stages don't wait for each other", residual(9, 3, 60, 5),
        "residual_search.cuh", "    grid_barrier(few.arrived);\n    for",
        "    if (!MUTANT) grid_barrier(few.arrived);\n    for",
        processors=3,
    ),
    Mutant(
        "copies aren't waited for", search("cores", "gaussian", 9, 1200, 8),
        "scan_cores.cuh", "wait_copies<1>();", "if (!MUTANT) wait_copies<1>();",
        "emulator", "copies that it never waited for",
    ),
    Mutant(
        "copies are waited for a step too late", search("matrix", "gaussian", 9, 700, 20),
        "scan_matrix.cuh", "wait_copies<STAGES - 2>();",
        "if (MUTANT) wait_copies<STAGES - 1>(); else wait_copies<STAGES - 2>();",
        "emulator", "copies that it never waited for",
    ),
    Mutant(
        "a shuffle of half the width", search("few", "gaussian", 9, 60, 33),
        "direct.cuh", "value[r] = combine_lanes(value[r], Sum{}, width);",
        "value[r] = combine_lanes(value[r], Sum{}, MUTANT ? width / 2 : width);",
    ),
    Mutant(
        "one lane shuffles alone", search("matrix", "gaussian", 9, 60, 40),
        "finish.cuh", "__shfl_sync(ALL_LANES, two.group, threadIdx.x % WARP - part)",
        "(MUTANT && part > 0 ? 0 : __shfl_sync(ALL_LANES, two.group, threadIdx.x % WARP - part))",
        "emulator", "different places|deadlock",
    ),
    Mutant(
        "a shuffle asks for half the lanes", search("cores", "duplicate_codes", 9, 60, 8),
        "direct.cuh", "__shfl_xor_sync(ALL_LANES, best.score, offset)",
        "__shfl_xor_sync(MUTANT ? 0xffffu : ALL_LANES, best.score, offset)",
        "emulator", "lane that isn't there|isn't in its own mask",
    ),
    Mutant(
        "half of a block comes to a barrier", accumulate(300, 5, 3),
        "accumulate.cuh", "  scratch[thread] = total;\n  __syncthreads();",
        "  scratch[thread] = total;\n  if (!MUTANT || thread < 64) __syncthreads();",
        "emulator", "deadlock: 64 of 128 threads ended, 64 wait at __syncthreads at accumulate.cuh",
    ),
    Mutant(
        "an addition that isn't atomic", accumulate(70, 3, 1),
        "accumulate.cuh", "atomicAdd(&counts[pass.digit(pass.key(at))], 1u);",
        "if (MUTANT) counts[pass.digit(pass.key(at))] += 1u; else atomicAdd(&counts[pass.digit(pass.key(at))], 1u);",
        "thread", "data race",
    ),
    Mutant(
        "a warp reads what it hasn't waited for", accumulate(70, 3, 1),
        "accumulate.cuh", "place = next[digit] + rank;\n    __syncwarp();",
        "place = next[digit] + rank;\n    if (!MUTANT) __syncwarp();",
        "thread", "data race",
    ),
    Mutant(
        "no mask over the last codes", search("few", "gaussian", 9, 61, 8),
        "direct.cuh", "score(codes, first + group, first + group < end, rows",
        "score(codes, first + group, MUTANT || first + group < end, rows",
        "address", "heap-buffer-overflow",
    ),
    Mutant(
        "no mask over the last rows", search("cores", "gaussian", 70, 60, 8),
        "scan_cores.cuh", "row < scan.n && j < view.dim", "(MUTANT || row < scan.n) && j < view.dim",
        "address", "heap-buffer-overflow",
    ),
    Mutant(
        "rows behind the last one have distances", min_distance(9, 1, 5),
        "min_distance.cuh", "row < added.n ? added.distances[row] : 0.0f",
        "MUTANT || row < added.n ? added.distances[row] : 0.0f",
        "address", "heap-buffer-overflow",
    ),
    Mutant(
        "lanes leave before the sum of their warp", min_distance(9, 1, 5),
        "min_distance.cuh", "float nearest = before;", "float nearest = before;\n    if (MUTANT && !open) continue;",
        "emulator", "deadlock|different places|lane that isn't there",
    ),
    Mutant(
        "only the last code counts", min_distance(40, 3, 5),
        "min_distance.cuh", "fminf(nearest, static_cast<float>(sum))",
        "fminf(MUTANT ? before : nearest, static_cast<float>(sum))",
    ),
    Mutant(
        "ties take the highest code", search("define", "duplicate_codes", 30, 60, 8),
        "direct.cuh", "return a.code < b.code ? a : b;", "return (a.code < b.code) != MUTANT ? a : b;",
    ),
    Mutant(
        "B is nothing", search("matrix", "rounded_midpoints", 60, 75, 33),
        "finish.cuh", "> 2.0f * bound.bound &&", "> (MUTANT ? 0.0f : 2.0f) * bound.bound &&",
    ),
    Mutant(
        "the second best is lost", heads("cores", "nearly_equal_norms", 9, 300, 8),
        "scan.cuh", "second = fmaxf(second, fminf(best, value));",
        "second = MUTANT ? second : fmaxf(second, fminf(best, value));",
    ),
    Mutant(
        "codes of a tile are mixed up", search("matrix", "gaussian", 20, 75, 33),
        "frame.cuh", "(inside / 2 % 4) * 16", "(inside / 2 + MUTANT) % 4 * 16",
    ),
    Mutant(
        "a thread takes the first code that may be the nearest", search("cores", "rounded_midpoints", 60, 75, 8),
        "direct.cuh", "if (narrowed.decided()) return", "if (narrowed.decided() || MUTANT) return",
    ),
    Mutant(
        "rows that stream stand still", search("matrix", "gaussian", 5, 20, 270),
        "scan_matrix.cuh", "scan.packed.count * columns + next_chunk * CHUNK;",
        "scan.packed.count * columns + (MUTANT ? 0 : next_chunk * CHUNK);",
    ),
    Mutant(
        "rows in registers are all of the first warp", search("three_products", "gaussian", 70, 90, 12),
        "scan_matrix.cuh", "const int row_at = (warp_row + lane % 16)",
        "const int row_at = ((MUTANT ? 0 : warp_row) + lane % 16)",
    ),
    Mutant(
        "rows that overflow about the center are certain", overflowing,
        "finish.cuh", "scale.tame && kind.moved_finite &&", "scale.tame && (MUTANT || kind.moved_finite) &&",
    ),
    Mutant(
        "codes that share a slot count as copies", search("matrix", "codes_themselves", 20, 75, 33),
        "copies.cuh", "if (first >= code) return false;", "if (first >= code || MUTANT) return first < code;",
    ),
    Mutant(
        "a code counts as its own copy", search("cores", "codes_themselves", 60, 30, 3),
        "copies.cuh", "first >= code", "first >= code + MUTANT",
    ),
    Mutant(
        "copies are looked for by a warp's first columns", search("matrix", "codes_one_ulp_apart", 40, 60, 70),
        "copies.cuh", "j < codes.dim; j += WARP", "j < (MUTANT ? WARP : codes.dim); j += WARP",
    ),
    Mutant(
        "a code that equals the one before it in some columns is left out", search("few", "lattice", 60, 60, 3),
        "direct.cuh", "differs |= e[i] != before[i];", "differs |= (!MUTANT || i == 0) && e[i] != before[i];",
    ),
    Mutant(
        "streamed rows are those of the first head", two_heads,
        "scan_matrix.cuh", "scan.packed.rows + (PARTS * head * scan.packed.count + first_row + line)",
        "scan.packed.rows + (PARTS * (MUTANT ? 0 : head) * scan.packed.count + first_row + line)",
    ),
    Mutant(
        "far codes never come into question", search("cores", "far_codes", 60, 130, 8),
        "finish.cuh", "two.best - 2.0f * bound.bound > bound.far_floor",
        "(MUTANT || two.best - 2.0f * bound.bound > bound.far_floor)",
    ),
    Mutant(
        "rows that aren't finite are answered", search("few", "non_finite_vectors", 20, 40, 5),
        "direct.cuh", "return combine_block(non_finite, Maximum{}, scratch) == 0;",
        "return combine_block(non_finite, Maximum{}, scratch) == 0 || MUTANT;",
    ),
)  # fmt: skip


SLOTS = "MOST_SLOTS = int64_t{1} << 28"


@functools.cache
def mutated() -> Path:
    """Return a copy of the kernels that can make each of the mistakes."""
    copy = emulation.scratch()
    for path in CSRC.glob("*.*h"):
        shutil.copy(path, copy)
    for number, mutant in enumerate(MUTANTS, 1):
        path = copy / mutant.file
        source = path.read_text()
        assert source.count(mutant.right) == 1, f"{mutant.file} no longer holds once: {mutant.right!r}"
        choice = mutant.mistaken.replace("MUTANT", f"(::emulator::mutant == {number})")
        path.write_text(source.replace(mutant.right, choice))
    # Few slots, so that codes meet in them.
    path = copy / "copies.cuh"
    source = path.read_text()
    assert source.count(SLOTS) == 1, f"copies.cuh no longer holds once: {SLOTS!r}"
    path.write_text(source.replace(SLOTS, "MOST_SLOTS = 5"))
    return copy


@functools.cache
def program(variant: str) -> Path:
    if emulation.missing():
        pytest.skip(emulation.missing())
    return emulation.build(variant, mutated())


def wrong(cases, **options) -> bool:
    """Return whether a call returns a wrong result.

    Raises:
        Failed: the program itself has said so.
    """
    answers = run([call for call, _ in cases], **options)
    return any(
        not torch.equal(found, expected)
        for (_, results), answer in zip(cases, answers, strict=True)
        for found, expected in zip(answer, results, strict=False)
    )


ORDER = {"address": "reverse", "thread": "threads"}
"""In which a sanitizer runs the threads."""

# Each kernel, in shapes that leave rests; few, since each CUDA thread becomes one of the CPU's under ThreadSanitizer.
SMALL = (
    search("few", "duplicate_codes", 9, 21, 6),
    search("cores", "non_finite_codes", 5, 100, 3),
    search("matrix", "rounded_midpoints", 2, 70, 20),
    search("matrix", "duplicate_codes", 2, 9, 12),
    residual(5, 2, 17, 6),
    accumulate(300, 4, 3),
    ema_update,
    min_distance(9, 2, 6),
)
LARGER = (
    search("few", "exact_midpoints", 9, 21, 33),
    search("cores", "duplicate_codes", 140, 150, 15),
    search("matrix", "gaussian", 70, 130, 65),
    search("matrix", "duplicate_codes", 5, 70, 270),
    search("define", "duplicate_codes", 4, 10, 7),
    search("define", "gaussian", 4, 10, 70),
    residual(130, 1, 9, 3),
    accumulate(530, 300, 1),
    min_distance(300, 3, 33),
)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(sanitizer):
    cases = SMALL if sanitizer == "thread" else SMALL + LARGER
    assert not wrong([case() for case in cases], by=program(sanitizer), order=ORDER[sanitizer], processors=2)


def test_the_copy_itself_is_right():
    cases = [mutant.case() for mutant in MUTANTS if mutant.layer == "indices"]
    for order in ORDERS:
        assert not wrong(cases, by=program("plain"), order=order, processors=1)


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=lambda number: MUTANTS[number - 1].name)
def test_a_mistake_is_found(number):
    mutant = MUTANTS[number - 1]
    sanitized = mutant.layer in ("address", "thread")
    by = program(mutant.layer if sanitized else "plain")
    case = [mutant.case()]
    if mutant.layer == "indices":
        assert any(wrong(case, by=by, order=order, processors=mutant.processors, mutant=number) for order in ORDERS)
        return
    with pytest.raises(Failed, match=mutant.says):
        wrong(case, by=by, order=ORDER.get(mutant.layer, "forward"), processors=mutant.processors, mutant=number)
