"""Predicted best times of a search on a GPU: a roofline from counted instructions and the device's data sheet.

Nothing here is measured, and everything printed says so. The counts are those of `kernels/counts.json`, which
`python -m fastvq.kernels.aot` takes from the compiled code, and for the CUDA kernels (`cuda_model`) those of
`cuda_counts.json`. A full GPU at its boost clock is assumed: latency, the last wave of blocks and heat come on top. The
rows that the second scan leaves uncertified are not included.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastvq.errors import BenchError

from . import cuda_model
from .cuda_model import COPIES, load_counts_of, load_cuda_counts
from .data import Shape
from .devices import DEVICES, LAUNCH_SECONDS, Device, Terms, device_named
from .peers import TRITON
from .report import duration, table

LABEL = "prediction, not a measurement"
UNCERTIFIED_SHARE = 0.01
"""Share of rows that the first scan leaves uncertified: that of clustered data on the CPU. SHOWN is a bad case."""
SHOWN = 0.05
FILLS = 3
"""Launches of a search that only set memory to zero."""


class Rival(NamedTuple):
    """Another library's search.

    The counts are of its code compiled for sm_90, 6 to 7 instructions for flash-kmeans; how many of them run at half
    rate is unknown, so that the prediction flatters it.
    """

    name: str
    alu: float
    rate: float
    element: int
    tile: int = 128
    """Rows for which a code is read once."""
    sync: bool = False
    """True if its products are mma.sync."""


# cuVS: three products of tf32 parts in tiles of 32 rows by CUTLASS for sm_80 (fused_distance_nn/gemm.h), which is fused
# with the least distance. Its instructions were not counted; they are at least those of a half norm and an argmin.
RIVALS = (
    Rival("flash-kmeans as published, bf16, not exact", 6.5, 1.0, 2),
    Rival("flash-kmeans as published, tf32, not exact", 6.5, 0.5, 4),
    Rival("cuVS as published, 3 products of tf32, not exact", 4.4, 0.5 / 3, 4, tile=32, sync=True),
    Rival("half norm + argmin, bf16, not exact", 4.4, 1.0, 2),
)


def load_counts() -> dict[str, Any]:
    """Return the counts that `python -m fastvq.kernels.aot --write` stored.

    Raises:
        BenchError: they are missing.
    """
    return load_counts_of("fastvq.kernels", "counts.json", "python -m fastvq.kernels.aot --write")


def scan_for(counts: dict[str, Any], target: str, dim: int, products: int) -> dict[str, Any]:
    """Return the record of the scan for vectors of `dim` dimensions with `products` products per distance.

    Raises:
        BenchError: none is shipped for the target.
    """
    scans = [r for r in counts["records"] if r["kernel"] == "_scan" and r["target"] == target]
    found = [r for r in scans if "alu" in r and r["config"]["TERMS"] == products and not r["config"].get("WIDE")]
    if not found:
        raise BenchError(
            f"model: counts.json has no scan of {products} products for {target}; "
            "python -m fastvq.kernels.aot --write makes it"
        )
    # Longer vectors than the longest compiled ones take more chunks of the same size.
    enough = [r for r in found if _columns(r) >= dim] or [r for r in found if _columns(r) == max(map(_columns, found))]

    def preference(record: dict[str, Any]) -> tuple[Any, ...]:
        config = record["config"]
        # Half the squares are in three columns of the padding, or beside the codes if these leave no room.
        misplaced = bool(config.get("BESIDE")) != (_columns(record) - dim < 3)
        # Exclude those compiled for a single row, or for few rows that split the codes.
        special = any(name in config for name in ("n", "dim", "size")), bool(config.get("SPLIT"))
        return _columns(record), not config["types"].startswith("fp32"), misplaced, *special, _epilogue(record)

    return min(enough, key=preference)


def _columns(record: dict[str, Any]) -> int:
    return record["config"]["BLOCK_D"] * record["config"].get("CHUNKS", 1)


def _epilogue(record: dict[str, Any], *, flattered: bool = False) -> float:
    """Return issue slots per distance: an instruction at half rate occupies its unit twice as long."""
    return max(record["alu"], 0.0 if flattered else 2 * record.get("half_rate", 0.0))


def scan_terms(
    device: Device, record: dict[str, Any], shape: Shape, rows: float, element: int = 4, *, flattered: bool = False
) -> Terms:
    """Return the terms of one scan of `rows` rows with `element` bytes per number; `flattered` ignores half rates."""
    config = record["config"]
    chunked = config.get("CHUNKS", 1) > 1
    packed = config["BLOCK_D"] * math.ceil(shape.d / config["BLOCK_D"]) if chunked else _columns(record)
    multiplied = record["columns"] * packed / _columns(record)
    pairs = rows * shape.k
    code = 2 * packed * (1 if config["TERMS"] == 1 else 2) + 4
    streamed = math.ceil(rows / config["BLOCK_N"]) * shape.k * code
    if chunked:
        # Rows too long for registers come again for every tile of codes.
        streamed += math.ceil(shape.k / config["BLOCK_K"]) * rows * (code - 4)
    return Terms(
        matrix=2 * pairs * multiplied / device.matrix,
        epilogue=pairs * _epilogue(record, flattered=flattered) / device.issue,
        memory=(rows * (shape.d * element + 8) + shape.k * code) / device.memory,
        cache=streamed / device.cache,
    )


def rival_terms(device: Device, rival: Rival, shape: Shape) -> Terms:
    """Return the terms of a search that keeps an argmin."""
    columns = max(16, 1 << (shape.d - 1).bit_length())
    pairs = shape.n * shape.k
    code = shape.d * rival.element + 4
    return Terms(
        matrix=2 * pairs * columns / (rival.rate * (device.sync if rival.sync else 1.0) * device.matrix),
        epilogue=pairs * rival.alu / device.issue,
        memory=(shape.n * (shape.d * rival.element + 8) + shape.k * code) / device.memory,
        cache=math.ceil(shape.n / rival.tile) * shape.k * code / device.cache,
    )


def predict(
    name: str, shape: Shape, *, uncertified_share: float = UNCERTIFIED_SHARE, element: int = 4
) -> dict[str, Any]:
    """Return all terms of a search, in seconds, as a document for `--json`.

    Args:
        name: of a device in DEVICES.
        uncertified_share: share of rows that the first scan leaves uncertified for the second.
        element: bytes of a number of x and of the codebook.

    Raises:
        BenchError: an invalid argument, by name; or no counts to predict from.
    """
    device, counts = device_named(name), load_counts()
    if not 0 <= uncertified_share <= 1:
        raise BenchError(f"uncertified_share: must be from 0 to 1, got {uncertified_share}")
    first, second = (scan_for(counts, device.target, shape.d, products) for products in (1, 3))
    # Sums, norms and packing read the codebook; both parts, half the squares, two norms, a hash and the slots of the
    # table of copies are written.
    packing = shape.k * (3 * shape.d * element + 4 * _columns(second) + 20 + COPIES) / device.memory
    launches = 4 + 1 + FILLS + sum(_launches(record) for record in (first, second))
    rest = packing + launches * LAUNCH_SECONDS
    parts: dict[str, Terms] = {}
    totals: dict[str, tuple[float, float]] = {}
    for share, flattered in dict.fromkeys(((uncertified_share, False), (SHOWN, False), (uncertified_share, True))):
        begin = scan_terms(device, first, shape, shape.n, element, flattered=flattered)
        again = scan_terms(device, second, shape, share * shape.n, element, flattered=flattered)
        if not flattered:
            parts |= {"1 product, all rows": begin, f"3 products, {share:.3g} of the rows": again}
        totals[f"search, {share:.3g} of the rows uncertified" + ", counted as the others" * flattered] = (
            begin.overlapped + again.overlapped + rest,
            begin.serial + again.serial + rest,
        )
    cuda = _cuda_ways(device, shape, uncertified_share, element)
    for title, way in cuda["ways"].items():
        parts |= {f"{title}: {part}": terms for part, terms in way.parts.items()}
        totals[title] = way.total()
    for rival in RIVALS:
        terms = rival_terms(device, rival, shape)
        parts[rival.name] = terms
        totals[rival.name] = (terms.overlapped + LAUNCH_SECONDS, terms.serial + LAUNCH_SECONDS)
    return {
        "what": LABEL,
        "device": name,
        **shape._asdict(),
        "triton": counts["triton"],
        "target": device.target,
        "scans": [{k: r[k] for k in ("config", "alu", "half_rate", "columns") if k in r} for r in (first, second)],
        "parts": {part: terms._asdict() | {"binding": terms.binding} for part, terms in parts.items()},
        "packing": packing,
        "launches": launches,
        "cuda": {
            "compiler": cuda["compiler"],
            "scans": [scan for way in cuda["ways"].values() for scan in way.scans],
            "ways": {t: {"packing": w.packing, "launches": w.launches} for t, w in cuda["ways"].items()},
        },
        "totals": {part: {"overlapped": best, "serial": worst} for part, (best, worst) in totals.items()},
    }


CUDA = "CUDA kernels"
"""Title in a prediction of the way in which csrc/cuda serves a shape by default."""
CUDA_INSTEAD = {"cores": "CUDA kernels, were it on CUDA cores", "matrix": "CUDA kernels, were it on matrix units"}
"""Titles of the other scan, if there are two."""


def _cuda_ways(device: Device, shape: Shape, uncertified_share: float, element: int) -> dict[str, Any]:
    """Return the ways in which the CUDA kernels can serve a shape, by title; none on devices of other vendors."""
    if not device.target.startswith("sm_"):
        return {"compiler": None, "ways": {}}
    counts = load_cuda_counts()
    own, *others = cuda_model.ways(counts["limits"], device, shape)
    named = {CUDA: own} | {CUDA_INSTEAD[other]: other for other in others}
    ways = {
        title: cuda_model.way_named(counts, device, way, shape, uncertified_share=uncertified_share, element=element)
        for title, way in named.items()
    }
    return {"compiler": counts["compiler"], "ways": ways}


def _launches(record: dict[str, Any]) -> int:
    """Return the launches of a tier: the scan, the join of split codes, the preparation of long rows."""
    return 1 + bool(record["config"].get("SPLIT")) + (record["config"].get("CHUNKS", 1) > 1)


def lines(predicted: dict[str, Any]) -> list[str]:
    """Return the printed lines of a prediction."""
    shape = Shape(predicted["n"], predicted["k"], predicted["d"])
    rows = [
        [part, *(_time(terms[name]) for name in Terms._fields), _NAMES[terms["binding"]]]
        for part, terms in predicted["parts"].items()
    ]
    totals = [[part, _time(total["overlapped"]), _time(total["serial"])] for part, total in predicted["totals"].items()]
    counted = [
        f"products {scan['config']['TERMS']}: {scan['alu']:.2f} ALU instructions a distance{_halved(scan)}, "
        f"{scan['columns']:g} columns, tiles of {scan['config']['BLOCK_N']} rows x {scan['config']['BLOCK_K']} codes"
        for scan in predicted["scans"]
    ]
    by_nvcc = [
        f"{scan['kernel']}: {scan['alu']:.2f} ALU instructions a distance{_halved(scan)}, "
        f"{scan['float32']:g} float32 products, {scan['shared']:.2f} bytes of shared memory a turn"
        for scan in predicted["cuda"]["scans"]
    ]
    if by_nvcc:
        counted += [f"and in that of {predicted['cuda']['compiler']}:", *by_nvcc]
    launches = "; ".join(
        f"{title}: {_time(way['packing'])}, {way['launches']} launches {duration(way['launches'] * LAUNCH_SECONDS)}"
        for title, way in predicted["cuda"]["ways"].items()
    )
    return [
        f"{LABEL}: {shape} on {predicted['device']}",
        f"Counted in the code that triton {predicted['triton']} makes for {predicted['target']}:",
        *(f"  {line}" for line in counted),
        "",
        table(rows, [f"terms ({LABEL})", *_NAMES.values(), "bound by"]),
        "",
        f"Packing the codebook {_time(predicted['packing'])}, {predicted['launches']} launches "
        f"{duration(predicted['launches'] * LAUNCH_SECONDS)} ({LABEL}); both are part of each search of fastvq:",
        *([f"({launches})"] if launches else []),
        "",
        table(totals, [f"total ({LABEL})", "if all overlaps", "if matrix and epilogue don't"]),
        "",
        "The others' epilogues count as if no instruction ran at half rate, which flatters them; they certify nothing.",
    ]


_NAMES = {"matrix": "matrix units", "epilogue": "epilogue", "memory": "HBM", "cache": "L2", "shared": "shared memory"}


def _time(seconds: float) -> str:
    if seconds == 0:
        return "-"
    return duration(seconds) if seconds >= 1e-4 else f"{1e6 * seconds:.2f} us"


def _halved(scan: dict[str, Any]) -> str:
    return f" ({scan['half_rate']:.2f} at half rate)" if "half_rate" in scan else ""


def beside_measured(reported: str, shape: Shape, contestants: list[dict[str, Any]], element: int = 4) -> list[str]:
    """Return the lines that compare a measured run on a CUDA device with the model, if it knows the device.

    This has not run on a GPU.
    """
    name = next((name for name, device in DEVICES.items() if device.reported in reported), None)
    if name is None:
        return []
    try:
        totals = predict(name, shape, element=element)["totals"]
        total = totals[f"search, {UNCERTIFIED_SHARE:.3g} of the rows uncertified"]
    except BenchError as error:
        return ["", str(error)]
    seconds = next((c["seconds"] for c in contestants if c["name"] == TRITON and "seconds" in c), None)
    measured = "" if seconds is None else f"fastvq triton, measured: {duration(seconds)}; "
    return [
        "",
        f"{measured}{LABEL}: {duration(total['overlapped'])} if all overlaps, "
        f"{duration(total['serial'])} if matrix units and epilogue don't",
    ]
