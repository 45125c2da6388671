"""Targets of the suite, each with its measured value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .peers import NATIVE, PRODUCT
from .small import LAYER, OP, PACKED
from .training import PEER

NOT_APPLICABLE = "not applicable"


class Outcome(NamedTuple):
    """A target, its measured value, and whether it is met: None if it could not be measured."""

    against: str
    on: str
    wanted: str
    measured: str
    met: bool | None
    why: str = ""
    """Measurement of the same run that explains a missed target."""

    @property
    def verdict(self) -> str:
        return NOT_APPLICABLE if self.met is None else "met" if self.met else "not met"


def seconds_by_name(record: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of the contestants that ran."""
    return {c["name"]: c["seconds"] for c in record["contestants"] if "seconds" in c}


def lead(record: dict[str, Any], peers: Iterable[str]) -> tuple[float, str] | None:
    """Return (how many times faster the native backend is than the fastest peer, that peer); None if neither ran."""
    seconds = seconds_by_name(record)
    ran = {name: seconds[name] for name in peers if name in seconds}
    if not ran or NATIVE not in seconds:
        return None
    best = min(ran, key=lambda name: ran[name])
    return ran[best] / seconds[NATIVE], best


def _where(record: dict[str, Any]) -> str:
    return f"N={record['n']} K={record['k']} D={record['d']} {record['data']}"


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def outcomes(document: dict[str, Any]) -> list[Outcome]:
    """Return all targets, in the order of the report."""
    peers = document["machine"]["peers"]
    rows = [_mean_lead(document, peers, "clustered", 2.5), _mean_lead(document, peers, "gaussian", 2.0)]
    rows += [_worst_lead(document, peers), _over_product(document), *_latents(document)]
    rows += [_share_of_peak(document, "float32", 64, 0.88), _share_of_peak(document, "int16", 128, 0.80)]
    return rows + _steps(document) + _small(document)


def _mean_lead(document: dict[str, Any], peers: list[str], data: str, wanted: float) -> Outcome:
    found = [lead(r, peers) for r in document["search"] if r["data"] == data]
    ratios = [f[0] for f in found if f]
    name = "the fastest peer, shape by shape"
    on = f"{data} data, geometric mean over {len(ratios)} shapes"
    if not ratios:
        return Outcome(name, on, f"{wanted} x", "no peer ran", None)
    return Outcome(name, on, f"{wanted} x", f"{_mean(ratios):.2f} x", _mean(ratios) >= wanted)


def _worst_lead(document: dict[str, Any], peers: list[str]) -> Outcome:
    found = [(lead(r, peers), _where(r)) for r in document["search"] + document["other"]]
    ratios = [(f[0], f[1], where) for f, where in found if f]
    name, on = "the fastest peer", "any shape and data, other shapes included"
    if not ratios:
        return Outcome(name, on, "1.2 x", "no peer ran", None)
    ratio, peer, where = min(ratios)
    one = document["scaling"]["N"][0]
    took = {who: 2e-9 * one["n"] * one["k"] * one["d"] / rate for who, rate in one["gflops"].items() if rate}
    listed = ", ".join(f"{who} {1e6 * seconds:.0f} us" for who, seconds in took.items())
    why = f"one row takes, at N={one['n']} K={one['k']} D={one['d']}: {listed}"
    return Outcome(name, on, "1.2 x", f"{ratio:.2f} x ({peer}, {where})", ratio >= 1.2, why)


OVER_PRODUCT = "torch.mm of the same shape into a preallocated output"


def _over_product(document: dict[str, Any]) -> Outcome:
    ratios = []
    for record in document["search"]:
        if record["data"] == "clustered" and record["d"] >= 64 and record["n"] >= 4096:
            found = lead(record, [PRODUCT])
            if found:
                ratios.append((found[0], _where(record), _shares_of_peaks(document, record)))
    on = "clustered, D >= 64, N >= 4096, worst"
    if not ratios:
        return Outcome(OVER_PRODUCT, on, "2.0 x", "nothing ran", None)
    ratio, where, why = min(ratios)
    return Outcome(OVER_PRODUCT, on, "2.0 x", f"{ratio:.2f} x ({where})", ratio >= 2.0, why)


def _shares_of_peaks(document: dict[str, Any], record: dict[str, Any]) -> str:
    """Return what search and product reach of the peaks of their instructions, whose ratio bounds that of the two."""
    float32, int16 = (document["ceilings"][kind] for kind in ("float32", "int16"))
    rates = {c["name"]: c["gflops"] for c in record["contestants"] if "gflops" in c}
    if not float32 or not int16 or not {NATIVE, PRODUCT} <= rates.keys():
        return ""
    return (
        f"int16 multiply-adds, on which the search runs, are at most {int16 / float32:.2f} times as fast as float32 "
        f"ones here; the search reached {rates[NATIVE] / int16:.0%} of its peak, "
        f"torch.mm {rates[PRODUCT] / float32:.0%} of its own"
    )


LATENTS = {(16384, 8192, 64): 10.0, (16384, 512, 64): 3.0, (16384, 8192, 256): 6.0}
"""Times as fast as torch.mm that a search of latents should be, by shape."""


def _latents(document: dict[str, Any]) -> list[Outcome]:
    rows = []
    for record in document["search"]:
        wanted = LATENTS.get((record["n"], record["k"], record["d"]))
        if record["data"] == "latents" and wanted is not None:
            found = lead(record, [PRODUCT])
            measured, met = (f"{found[0]:.2f} x", found[0] >= wanted) if found else ("not run", None)
            why = _shares_of_peaks(document, record)
            rows.append(Outcome(OVER_PRODUCT, _where(record), f"{wanted} x", measured, met, why))
    return rows


def _share_of_peak(document: dict[str, Any], tier: str, smallest_dim: int, wanted: float) -> Outcome:
    name, on = f"the measured {tier} peak", f"{tier} tier alone, D >= {smallest_dim}, worst"
    ceiling = document["ceilings"][tier]
    found = [r for r in document["forced"] if r["tier"] == tier and "gflops" in r and r["d"] >= smallest_dim]
    if ceiling is None or not found:
        return Outcome(name, on, f"{wanted:.0%}", "no such instructions" if ceiling is None else "not run", None)
    # A peak that was measured in turns with the tier suffered from the same load.
    share, peak, worst = min(
        ((r["gflops"] / r.get("peak", ceiling), r.get("peak", ceiling), r) for r in found), key=_first
    )
    why = f"D={worst['d']}"
    if "product" in worst:
        product = worst["product"] / worst["float32_peak"]
        why += f"; in turns with it a torch.mm of square matrices reached {product:.0%} of the float32 peak"
    return Outcome(name, on, f"{wanted:.0%}", f"{share:.0%} of {peak:.0f} GFLOP/s", share >= wanted, why)


def _first(values: tuple[float, ...]) -> float:
    return values[0]


def _steps(document: dict[str, Any]) -> list[Outcome]:
    plain = [r for r in document["steps"] if not r["stages"]]
    residual = [r for r in document["steps"] if r["stages"]]
    name = f"VectorQuantize of {PEER}, training step"
    rows = []
    ratios = [r["ratio"] for r in plain if "ratio" in r]
    tests: list[tuple[str, float, Callable[[list[float]], float]]] = [("geometric mean", 20, _mean), ("each", 10, min)]
    for on, wanted, summary in tests:
        if ratios:
            rows.append(Outcome(name, on, f"{wanted} x", f"{summary(ratios):.1f} x", summary(ratios) >= wanted))
        else:
            rows.append(Outcome(name, on, f"{wanted} x", plain[0].get("not_run", "not run"), None))
    for r in residual:
        on = f"{r['stages']} stages, N={r['n']} K={r['k']} D={r['d']}"
        measured = f"{r['ratio']:.1f} x" if "ratio" in r else r["not_run"]
        met = r["ratio"] >= 12 if "ratio" in r else None
        why = ""
        if "search_seconds" in r:
            why = f"the search alone took {r['search_seconds'] / r['seconds']['fastvq']:.0%} of fastvq's step"
        rows.append(Outcome(f"ResidualVQ of {PEER}, training step", on, "12 x", measured, met, why))
    return rows


def _small(document: dict[str, Any]) -> list[Outcome]:
    """Return how the ways to encode a small batch compare with the fastest peer, in the worst case of each."""
    records = [r for r in document.get("small", []) if r["what"] == "encode"]
    rows = []
    for name, wanted in ((OP, 1.0), (LAYER, 1.0), (PACKED, 1.0), (PACKED, 3.0)):
        ratios = []
        for r in (r for r in records if wanted <= 1 or r["stages"] > 1):
            seconds = seconds_by_name(r)
            peers = [taken for who, taken in seconds.items() if not who.startswith("fastvq")]
            if name in seconds and peers:
                where = f"N={r['n']} K={r['k']} D={r['d']} Q={r['stages']}"
                ratios.append((min(peers) / seconds[name], where))
        on = f"small batches, {name.removeprefix('fastvq ')}, {'worst' if wanted <= 1 else 'worst residual stack'}"
        if ratios:
            ratio, where = min(ratios)
            measured = f"{ratio:.2f} x ({where})"
            rows.append(Outcome("the fastest other encoder", on, f"{wanted} x", measured, ratio >= wanted))
    return rows
