"""Predictions for the CUDA kernels (csrc/cuda): the way in which they serve a shape, and the roofline of each way.

Counts are those of `cuda_counts.json`, which `python csrc/cuda/counts.py --write` takes from the compiled code. Work
outside the scans is counted in the source: the certification of `finish`, and the distances of few rows.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from typing import Any, NamedTuple

from fastvq.errors import BenchError

from .data import Shape
from .devices import LAUNCH_SECONDS, SHARED_CLOCK, Device, Terms

DISTANCE_OPERATIONS = 2
"""Operations per dimension of a float32 distance, csrc/cuda/direct.cuh: a difference and a multiply-add."""
FINITE_OPERATIONS = 2
"""Operations per dimension of the check that a code is finite: a product and a comparison."""
PASSES = 2
"""Passes over the candidate codes: the least distance, then the codes that may have it."""
SCANNED = 12
"""Bytes that a scan leaves per row: two scores and a group."""
COPIES = 8 + 4 * 16
"""Bytes per code by which copies are found: a hash, and slots of a table."""
CORES_COLUMNS = 16
"""Largest number of columns of the scan on CUDA cores."""
SHORT_COLUMNS, FINISH_THREADS = 32, 128
"""From csrc/cuda/finish.cuh: largest dimension of rows that one thread finishes, and threads of a block."""
ROW_OPERATIONS, ELEMENT_OPERATIONS, CODE_OPERATIONS, SHUFFLE_OPERATIONS = 250, 20, 20, 4
"""Approximate operations, besides distances, of a lane that finishes a row.

Per row: bound, scale and the scan's results; per element of its own: the largest and the squares of its parts; per
code: the range; per halving of the lanes: two shuffles.
"""
TILE, STAGES, PADDING = 64, 3, 8
"""Scan on matrix units: codes per tile, tiles in flight, and float16 numbers of padding between vectors."""


class Way(NamedTuple):
    """A way in which the kernels serve a shape: passes by name, seconds of packing, launches, and counted scans."""

    parts: dict[str, Terms]
    packing: float
    launches: int
    scans: list[dict[str, Any]]

    def total(self) -> tuple[float, float]:
        """Return seconds if everything overlaps within a pass, and if matrix units and epilogue do not overlap."""
        rest = self.packing + self.launches * LAUNCH_SECONDS
        return sum(p.overlapped for p in self.parts.values()) + rest, sum(p.serial for p in self.parts.values()) + rest


def load_cuda_counts() -> dict[str, Any]:
    """Return the counts that `python csrc/cuda/counts.py --write` stored.

    Raises:
        BenchError: they are missing.
    """
    return load_counts_of("fastvq.bench", "cuda_counts.json", "python csrc/cuda/counts.py --write")


def load_counts_of(package: str, name: str, command: str) -> dict[str, Any]:
    """Return the JSON file `name` of a package, which `command` writes.

    Raises:
        BenchError: it is missing.
    """
    try:
        text = importlib.resources.files(package).joinpath(name).read_text()
    except OSError as error:
        raise BenchError(f"model: {package} has no {name}; {command} makes it: {error}") from error
    return json.loads(text)


def served_by(limits: dict[str, int], device: Device, shape: Shape) -> str:
    """Return the way that serves a shape by default, as in csrc/cuda/search.cuh: few, cores, matrix or define."""
    if shape.n <= limits["few_rows"]:
        return "few"
    if shape.d <= limits["cores_dim"]:
        return "cores"
    rows = FINISH_THREADS // finish_lanes(shape.d)
    return "matrix" if shape.d <= SHORT_COLUMNS or rows * 4 * shape.d <= device.shared else "define"


def ways(limits: dict[str, int], device: Device, shape: Shape) -> list[str]:
    """Return the default way for a shape and, of the two scans, the other one if it is possible as well."""
    served = served_by(limits, device, shape)
    others = {"cores": "matrix", "matrix": "cores"} if shape.d <= CORES_COLUMNS else {}
    return [served, *([others[served]] if served in others else [])]


def way_named(
    counts: dict[str, Any], device: Device, way: str, shape: Shape, *, uncertified_share: float, element: int = 4
) -> Way:
    """Return the terms of one of `ways`.

    Raises:
        BenchError: there is no scan for the device in the counts.
    """
    if way == "few":
        at_once = counts["limits"]["few_at_once"]
        return Way({f"few rows, {at_once} at a time": few_terms(device, shape, at_once, element)}, 0.0, 2, [])
    if way == "define":
        return Way(
            {"float32 distances to all codes": direct_terms(device, shape, shape.n, shape.k, element)}, 0.0, 1, []
        )
    tiers = [(0, 1.0)] if way == "cores" else [(1, 1.0), (3, uncertified_share)]
    parts: dict[str, Terms] = {}
    scans = [scan_for(counts, device, shape.d, products) for products, _ in tiers]
    for scan, (products, share) in zip(scans, tiers, strict=True):
        of_rows = "all rows" if products < 3 else f"{share:.3g} of the rows"
        how = "scan on CUDA cores" if way == "cores" else f"scan in {products} product{'s' * (products > 1)}"
        parts[f"{how}, {of_rows}"] = scan_terms(device, scan, shape, share * shape.n, element)
        parts[f"{scan['group']} codes a row certified, {of_rows}"] = finish_terms(
            device, scan, shape, share * shape.n, element
        )
    # Hashes, norms and packing read the codebook; packed codes are written, with two lengths and half a square of each.
    packed = 4 * packed_columns(scans[0], shape.d)
    packing = shape.k * (3 * shape.d * element + packed + 20 + COPIES) / device.memory
    # A fill, hashes, norms, decision, packing; a scan and its end for each tier, packing of rows that stream; the
    # definition.
    launches = 5 + 2 * len(tiers) + sum(scan.get("where") == "streamed" for scan in scans) + 1
    return Way(parts, packing, launches, scans)


def scan_for(counts: dict[str, Any], device: Device, dim: int, products: int) -> dict[str, Any]:
    """Return the record of the scan for vectors of `dim` dimensions, as csrc/cuda/search.cuh chooses it.

    `products` is the number of products, 0 for CUDA cores.

    Raises:
        BenchError: none is shipped for the target.
    """
    found = [r for r in counts["records"] if r["target"] == device.target and r["products"] == products]
    if products == 0:
        fitting = sorted((r for r in found if r["step"] >= dim), key=lambda r: r["step"])
    else:
        columns = matrix_columns(dim)
        whole = [r for r in found if r["where"] == "registers" and r["step"] == columns]
        stay = [r for r in found if r["where"] == "shared memory" and shared_bytes(r, columns) <= device.shared]
        fitting = whole or stay or [r for r in found if r["where"] == "streamed"]
    if not fitting:
        what = "on CUDA cores" if products == 0 else f"in {products} products"
        raise BenchError(
            f"model: cuda_counts.json has no scan {what} of {dim} dimensions for {device.target}; "
            "python csrc/cuda/counts.py --write makes it"
        )
    return fitting[0]


def matrix_columns(dim: int) -> int:
    """Return the number of columns of a vector on matrix units."""
    return 16 if dim <= 16 else 32 if dim <= 32 else 64 * math.ceil(dim / 64)


def shared_bytes(scan: dict[str, Any], columns: int) -> int:
    """Return the shared memory, in bytes, of a block of a scan on matrix units."""
    parts = 2 if scan["products"] == 3 else 1
    streamed, stride = scan["where"] == "streamed", scan["step"] + PADDING
    width = TILE * scan["across"]
    stage = parts * (width + streamed * scan["rows"]) * stride * 2 + width * 4
    rows = 0 if streamed else parts * scan["rows"] * (columns + PADDING) * 2 + scan["rows"] * 4
    return STAGES * stage + rows


def packed_columns(scan: dict[str, Any], dim: int) -> int:
    """Return the number of columns of a vector for this scan."""
    return scan["step"] if scan["products"] == 0 else matrix_columns(dim)


def scan_terms(device: Device, scan: dict[str, Any], shape: Shape, rows: float, element: int = 4) -> Terms:
    """Return the terms of one scan of `rows` rows with `element` bytes per number.

    An instruction at half rate occupies its unit twice as long, a float32 product or sum as long as the lanes for these
    need. For long rows that take several turns, only the ALU instructions of one turn are counted: a lower bound.
    """
    columns, pairs = packed_columns(scan, shape.d), rows * shape.k
    turns = columns / scan["step"]
    vector = 4 * columns if scan["products"] == 0 else 2 * columns * (2 if scan["products"] == 3 else 1)
    code, streamed = vector + 4, scan.get("where") == "streamed"
    tiles = math.ceil(shape.k / (TILE * scan["across"])) if streamed else 0
    slots = max(scan["alu"], 2 * scan["half_rate"], scan["float32"] * device.lanes / device.float32)
    return Terms(
        matrix=2 * pairs * columns * scan["products"] / (device.sync * device.matrix),
        epilogue=pairs * slots / device.issue,
        # Rows that stream are written once as float16 parts, and come again with every tile of codes.
        memory=(rows * (shape.d * element + SCANNED + streamed * vector) + shape.k * code) / device.memory,
        cache=(math.ceil(rows / scan["rows"]) * shape.k * code + tiles * rows * vector) / device.cache,
        shared=pairs * scan["shared"] * turns / (device.units * SHARED_CLOCK * device.clock),
    )


def finish_lanes(dim: int) -> int:
    """Return the number of lanes that finish a row together."""
    return 1 if dim <= SHORT_COLUMNS else 8 if dim <= 256 else 32


def finish_terms(device: Device, scan: dict[str, Any], shape: Shape, rows: float, element: int = 4) -> Terms:
    """Return the terms of re-scoring each row: its best group of codes, gathered from the cache, and distances."""
    lanes = finish_lanes(shape.d)
    own = 4 * math.ceil(shape.d / (4 * lanes))
    code = (
        own * (DISTANCE_OPERATIONS + FINITE_OPERATIONS) + CODE_OPERATIONS + SHUFFLE_OPERATIONS * int(math.log2(lanes))
    )
    operations = lanes * (ROW_OPERATIONS + own * ELEMENT_OPERATIONS + scan["group"] * code)
    terms = direct_terms(device, shape, rows, scan["group"], element)
    return terms._replace(
        epilogue=rows * operations / device.issue, memory=rows * (shape.d * element + SCANNED + 8) / device.memory
    )


def direct_terms(device: Device, shape: Shape, rows: float, codes: int, element: int = 4) -> Terms:
    """Return the terms of float32 distances of each row to `codes` codes of its own, which the cache provides."""
    elements = rows * codes * shape.d
    return Terms(
        matrix=0.0,
        epilogue=PASSES * (DISTANCE_OPERATIONS + FINITE_OPERATIONS) * elements / device.issue,
        memory=(rows * (shape.d * element + 8) + shape.k * shape.d * element) / device.memory,
        cache=elements * element / device.cache,
    )


def few_terms(device: Device, shape: Shape, at_once: int, element: int = 4) -> Terms:
    """Return the terms of float32 distances of a few rows: each code is read once for `at_once` of them.

    The first read is from memory.
    """
    read = math.ceil(shape.n / at_once) * shape.k * shape.d
    operations = DISTANCE_OPERATIONS * shape.n * shape.k * shape.d + FINITE_OPERATIONS * read
    return Terms(
        matrix=0.0,
        epilogue=operations / device.issue,
        memory=(shape.n * (shape.d * element + 8) + shape.k * shape.d * element) / device.memory,
        cache=read * element / device.cache,
    )
