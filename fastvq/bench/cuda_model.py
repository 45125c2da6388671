"""The part of the prediction that is about the CUDA kernels (csrc/cuda): which of their ways serves a shape, and the
roofline of each.

Counts are those of `cuda_counts.json`, which `python csrc/cuda/counts.py --write` takes from the compiled code. What a
search adds beside its scans is counted in the source: the certification of `finish`, and the distances of few rows.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from typing import Any, NamedTuple

from .data import BenchError, Shape
from .devices import LAUNCH_SECONDS, SHARED_CLOCK, Device, Terms

DISTANCE_OPERATIONS = 2
"""Of one dimension of a float32 distance, csrc/cuda/direct.cuh: a difference and a multiply-add."""
FINITE_OPERATIONS = 2
"""Of one dimension of a code, which must be finite: a product and a comparison."""
PASSES = 2
"""Over the codes that may be nearest: which is the least distance, and which codes may have it."""
SCANNED = 12
"""Bytes that a scan leaves of a row: two scores and a group."""


class Way(NamedTuple):
    """How the kernels take a shape: the passes by name, seconds of packing, launches, and the counted scans."""

    parts: dict[str, Terms]
    packing: float
    launches: int
    scans: list[dict[str, Any]]

    def total(self) -> tuple[float, float]:
        """Seconds if everything overlaps within a pass, and if matrix units and epilogue don't."""
        rest = self.packing + self.launches * LAUNCH_SECONDS
        return sum(p.overlapped for p in self.parts.values()) + rest, sum(p.serial for p in self.parts.values()) + rest


def load_cuda_counts() -> dict[str, Any]:
    """What `python csrc/cuda/counts.py --write` stored.

    Raises:
        BenchError: it isn't there.
    """
    try:
        text = importlib.resources.files("fastvq.bench").joinpath("cuda_counts.json").read_text()
    except OSError as error:
        raise BenchError(
            f"model: fastvq.bench has no cuda_counts.json; python csrc/cuda/counts.py --write makes it: {error}"
        ) from error
    return json.loads(text)


def served_by(limits: dict[str, int], shape: Shape) -> str:
    """Which way serves a shape by itself, as csrc/cuda/search.cuh chooses it: "few", "cores", "matrix" or "define"."""
    if shape.n <= limits["few_rows"]:
        return "few"
    return "cores" if shape.d <= limits["cores_dim"] else "matrix" if shape.d <= limits["matrix_dim"] else "define"


def ways(limits: dict[str, int], shape: Shape) -> list[str]:
    """The way that serves a shape, and the scan on matrix units where it could as well."""
    served = served_by(limits, shape)
    return [served, "matrix"] if served == "cores" else [served]


def way_named(
    counts: dict[str, Any], device: Device, way: str, shape: Shape, *, open_share: float, element: int = 4
) -> Way:
    """The terms of one of `ways`.

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
    tiers = [(0, 1.0)] if way == "cores" else [(1, 1.0), (3, open_share)]
    parts: dict[str, Terms] = {}
    scans = [scan_for(counts, device.target, shape.d, products) for products, _ in tiers]
    for scan, (products, share) in zip(scans, tiers, strict=True):
        of_rows = "all rows" if products < 3 else f"{share:.3g} of the rows"
        how = "scan on CUDA cores" if way == "cores" else f"scan in {products} product{'s' * (products > 1)}"
        parts[f"{how}, {of_rows}"] = scan_terms(device, scan, shape, share * shape.n, element)
        parts[f"{scan['group']} codes a row certified, {of_rows}"] = finish_terms(
            device, scan, shape, share * shape.n, element
        )
    # Norms and packing read the codebook; what is packed is written, with two lengths and half a square of each code.
    packed = 4 * packed_columns(scans[0], shape.d)
    packing = shape.k * (2 * shape.d * element + packed + 20) / device.memory
    # Norms, decision, packing; a fill, a scan and its end for each tier; the definition.
    return Way(parts, packing, 3 + 3 * len(tiers) + 1, scans)


def scan_for(counts: dict[str, Any], target: str, dim: int, products: int) -> dict[str, Any]:
    """The record of the scan that takes vectors of `dim` dimensions in so many products, 0 for CUDA cores.

    Raises:
        BenchError: none is shipped for the target.
    """
    found = [r for r in counts["records"] if r["target"] == target and r["products"] == products]
    # On CUDA cores whole vectors stand in registers; on matrix units columns come in steps.
    step = dim if products == 0 else 32 if dim <= 32 else 64
    fitting = [r for r in found if (r["step"] >= step if products == 0 else r["step"] <= step)]
    if not fitting:
        what = "on CUDA cores" if products == 0 else f"in {products} products"
        raise BenchError(
            f"model: cuda_counts.json has no scan {what} of {dim} dimensions for {target}; "
            "python csrc/cuda/counts.py --write makes it"
        )
    if products == 0:
        return min(fitting, key=lambda r: r["step"])
    # The longest steps, and the blocks of the most rows, for which shared memory has room on all DEVICES.
    return max(fitting, key=lambda r: (r["step"], r["rows"]))


def packed_columns(scan: dict[str, Any], dim: int) -> int:
    """Columns that a vector takes up for this scan."""
    if scan["products"] == 0:
        return scan["step"]
    return 32 if dim <= 32 else 64 * math.ceil(dim / 64)


def scan_terms(device: Device, scan: dict[str, Any], shape: Shape, rows: float, element: int = 4) -> Terms:
    """The terms of one scan of `rows` rows of `element` bytes a number.

    An instruction at half rate holds its unit as long as two, a float32 product or sum as long as the lanes for these
    take. Of several turns for long rows the ALU instructions of one are counted: at least these.
    """
    columns, pairs = packed_columns(scan, shape.d), rows * shape.k
    turns = columns / scan["step"]
    code = 4 * columns + 4 if scan["products"] == 0 else 2 * columns * (2 if scan["products"] == 3 else 1) + 4
    slots = max(scan["alu"], 2 * scan["half_rate"], scan["float32"] * device.lanes / device.float32)
    return Terms(
        matrix=2 * pairs * columns * scan["products"] / (device.sync * device.matrix),
        epilogue=pairs * slots / device.issue,
        memory=(rows * (shape.d * element + SCANNED) + shape.k * code) / device.memory,
        cache=math.ceil(rows / scan["rows"]) * shape.k * code / device.cache,
        shared=pairs * scan["shared"] * turns / (device.units * SHARED_CLOCK * device.clock),
    )


def finish_terms(device: Device, scan: dict[str, Any], shape: Shape, rows: float, element: int = 4) -> Terms:
    """Each row again, and the codes of its best group: gathered from the cache, and their float32 distances."""
    terms = direct_terms(device, shape, rows, scan["group"], element)
    return terms._replace(memory=rows * (shape.d * element + SCANNED + 8) / device.memory)


def direct_terms(device: Device, shape: Shape, rows: float, codes: int, element: int = 4) -> Terms:
    """Float32 distances of each row to so many codes of its own, read from the cache for it alone."""
    elements = rows * codes * shape.d
    return Terms(
        matrix=0.0,
        epilogue=PASSES * (DISTANCE_OPERATIONS + FINITE_OPERATIONS) * elements / device.issue,
        memory=(rows * (shape.d * element + 8) + shape.k * shape.d * element) / device.memory,
        cache=elements * element / device.cache,
    )


def few_terms(device: Device, shape: Shape, at_once: int, element: int = 4) -> Terms:
    """Float32 distances of a few rows: each code is read once for `at_once` of them, from memory the first time."""
    read = math.ceil(shape.n / at_once) * shape.k * shape.d
    operations = DISTANCE_OPERATIONS * shape.n * shape.k * shape.d + FINITE_OPERATIONS * read
    return Terms(
        matrix=0.0,
        epilogue=operations / device.issue,
        memory=(shape.n * (shape.d * element + 8) + shape.k * shape.d * element) / device.memory,
        cache=read * element / device.cache,
    )
