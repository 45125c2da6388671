"""The page of a run on a GPU, from its document alone, however little of it there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from fastvq.bench.report import duration, table

SOURCE, TARGET = "gpu.json", "gpu-measured.md"
"""The document and its page in docs/."""
OWN, PRODUCT = "fastvq", "torch.mm alone"
PUBLISHED = [
    ["flash-kmeans, bfloat16, search", "1048576 x 65536 x 64", "B200", "20.0 ms"],
    ["flash-kmeans, bfloat16, search", "1048576 x 65536 x 128", "B200", "21.1 ms"],
    ["flash-kmeans, bfloat16, search", "1048576 x 65536 x 256", "B200", "29.4 ms"],
    ["flashlib, float16, 5 iterations of k-means", "524288 x 4096 x 256", "H200", "11.03 ms"],
]
"""Times that the authors of flash-kmeans and flashlib published; nobody measured them here."""
REHEARSED = "**A rehearsal on a CPU at tiny sizes. No figure here is of a GPU.**"


def page(document: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    steps = {step["name"]: step for step in document["steps"]}
    sections = [
        _head(document, steps["machine"]["results"]),
        _steps(document),
        _summary(steps["times"]["results"], steps["prediction"]["results"]),
        _exactness([steps[name] for name in ("exact-triton", "exact-cuda", "full-triton", "full-cuda")]),
        _tests([steps[name] for name in ("tests", "kernel-tests")]),
        _times(steps["times"]["results"]),
        _contests("Launch configurations", steps["autotune"]["results"]),
        _contests("Kernels of the CUDA library, by FASTVQ_CUDA_PATH", steps["paths"]["results"]),
        _prediction(steps["prediction"]["results"]),
        _published(),
        _failures(document),
    ]
    return "\n".join(section for section in sections if section)


def _find(results: Iterable[dict[str, Any]], what: str) -> dict[str, Any]:
    return next((r for r in results if r.get("what") == what and "error" not in r), {})


def _head(document: dict[str, Any], results: list[dict[str, Any]]) -> str:
    device, found = _find(results, "device"), _find(results, "versions")
    at_rest, loaded = _find(results, "clocks at rest"), _find(results, "clocks under load")
    versions = ", ".join(f"{name} {version or '(missing)'}" for name, version in found.get("versions", {}).items())
    rates = [
        f"{r['what'].removeprefix('product of ').removesuffix(' matrices')} {r['tflops']:.3g} TFLOP/s"
        for r in results
        if "tflops" in r
    ]
    copy = _find(results, "copy").get("terabytes")
    rates += [f"copy {copy:.3g} TB/s"] if copy else []
    lines = [
        "# Measured on a GPU",
        "",
        f"Rendered from [{SOURCE}]({SOURCE}), which `{document['command']}` wrote on {document['date']}; don't edit.",
        "",
        *([REHEARSED, ""] if document["rehearsal"] else []),
        f"- Device: {device.get('name', 'unknown')}, compute capability {device.get('capability')}, "
        f"{device.get('units', '?')} multiprocessors, driver {at_rest.get('driver_version', 'unknown')}.",
        f"- SM clock {at_rest.get('clocks.sm', '?')} at rest, {loaded.get('clocks.sm', '?')} after a load, at most "
        f"{at_rest.get('clocks.max.sm', '?')}; memory clock {loaded.get('clocks.mem', '?')}.",
        f"- Rates of large products and of a copy, measured in the same run: {', '.join(rates) or 'not measured'}.",
        f"- Host: {found.get('processor', 'unknown')}, {found.get('cores', '?')} cores.",
        f"- Versions: {versions or 'unknown'}.",
        f"- fastvq {document['fastvq']}, commit {found.get('commit') or 'unknown'}.",
        "",
    ]
    return "\n".join(lines)


def _steps(document: dict[str, Any]) -> str:
    rows = []
    for step in document["steps"]:
        took = f"{step['seconds']:.0f} s of {step['limit']:.0f}" if "seconds" in step else ""
        cases = [case for r in step["results"] for case in (r, *r.get("contestants", []))]
        counts = {
            "not run": sum("not_run" in c or c.get("outcome") == "not run" for c in cases),
            "with an error": sum("error" in c or "errors" in c or c.get("outcome") == "crashed" for c in cases),
            "wrong": sum(bool(c.get("wrong")) for c in cases if step["name"] != "times" or _own(c.get("name", OWN))),
        }
        notes = [step.get("reason", ""), *(f"{count} {what}" for what, count in counts.items() if count)]
        rows.append([step["name"], step["what"], step["status"], took, "; ".join(filter(None, notes))])
    return f"""## Steps

{table(rows, ["step", "", "", "time", ""])}
"""


def _fastest(contestants: Iterable[dict[str, Any]], chosen: Callable[[str], bool]) -> dict[str, Any] | None:
    ran = [c for c in contestants if "seconds" in c and chosen(c["name"])]
    return min(ran, key=_best, default=None)


def _best(contestant: dict[str, Any]) -> float:
    """Return the seconds of a contestant's launches alone, or of its calls where these were not captured."""
    return min(contestant["seconds"], contestant.get("graph_seconds", contestant["seconds"]))


def _own(name: str) -> bool:
    return name.startswith(OWN)


def _other(name: str) -> bool:
    return not _own(name) and not name.startswith(PRODUCT)


def _where(record: dict[str, Any]) -> str:
    stages = f", {record['stages']} stages" if record.get("stages") else ""
    data = f", {record['data']}" if record.get("data") else ""
    return f"{record['n']} x {record['k']} x {record['d']}{stages}{data}"


def _summary(times: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> str:
    predicted = {_where(r): r for r in predictions if "searches" in r}
    rows = []
    for record in times:
        contestants = record.get("contestants", [])
        own, other = _fastest(contestants, _own), _fastest(contestants, _other)
        product = _fastest(contestants, lambda name: name == PRODUCT)
        if own is None:
            rows.append([record["what"], _where(record), _reason(record), "", "", "", ""])
            continue
        search = predicted.get(_where(record), {}).get("searches", {}) if record["what"] == "search" else {}
        rows.append(
            [
                record["what"],
                _where(record),
                f"{duration(_best(own))} ({own['name']})" + _mistakes(own),
                f"{_best(other) / _best(own):.2f} x, {other['name']}{_mistakes(other)}" if other else "",
                f"{_best(product) / _best(own):.2f} x" if product else "",
                duration(search[own["name"]]["predicted"]) if own["name"] in search else "",
                duration(own["seconds"]),
            ]
        )
    if not rows:
        return "Nothing was timed.\n"
    headers = ["", "N x K x D", "fastvq", "fastest other", "torch.mm", "prediction", "a call"]
    return f"""## Summary

Medians by CUDA events, of launches replayed as a CUDA graph; "a call" adds the gaps that Python leaves between
launches. Others are shown by how many times as long they take; `torch.mm` is the bare float32 product, without a
search. The prediction is that of `fastvq bench --model`, the best that could happen. Inputs are rotated, so that none
comes from the cache.

{table(rows, headers)}
"""


def _mistakes(contestant: dict[str, Any]) -> str:
    return f", {contestant['wrong']} rows WRONG" if contestant.get("wrong") else ""


def _reason(record: dict[str, Any]) -> str:
    return record.get("error") or f"not run: {record.get('not_run', 'no contestant of fastvq ran')}"


def _exactness(steps: list[dict[str, Any]]) -> str:
    rows, notes = [], []
    for step in steps:
        kinds = dict.fromkeys(r["what"] for r in step["results"])
        for what in kinds:
            found = [r for r in step["results"] if r["what"] == what]
            ran = [r for r in found if "wrong" in r]
            searches, checked, wrong = (sum(r.get(key, 1) for r in ran) for key in ("searches", "rows", "wrong"))
            missing = len(found) - len(ran)
            rows.append([step["what"], what, str(searches), str(checked), str(wrong), str(missing) if missing else ""])
        notes += [
            f"- {step['what']}, {r['what']}, {r.get('data', '')} {_shape(r)}: {r.get('first') or r.get('error') or ''}"
            for r in step["results"]
            if r.get("wrong") or "error" in r
        ]
    if not rows:
        return "## Exactness\n\nNothing was checked.\n"
    text = table(rows, ["", "", "searches", "indices", "wrong", "cases that failed or did not run"])
    return "\n".join(["## Exactness", "", text, "", *notes, *([""] if notes else [])])


def _shape(record: dict[str, Any]) -> str:
    return f"{record['n']} x {record['k']} x {record['d']} {record.get('dtype', '')}" if "n" in record else ""


def _tests(steps: list[dict[str, Any]]) -> str:
    lines = ["## Tests", ""]
    for step in steps:
        counts = Counter(r["outcome"] for r in step["results"] if "outcome" in r)
        total = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        lines.append(f"- {step['what']}: {total or 'none ran'}.")
        for r in step["results"]:
            if r.get("outcome") in ("failed", "crashed"):
                last = (r.get("text") or "").strip().splitlines()[-1:] or [""]
                lines.append(f"  - {r['outcome']}: `{r['test']}` {last[0]}")
    return "\n".join([*lines, ""])


def _contest(record: dict[str, Any]) -> str:
    rows = []
    for c in record["contestants"]:
        if "seconds" not in c:
            rows.append([c["name"], _reason(c), "", "", ""])
            continue
        graph = duration(c["graph_seconds"]) if "graph_seconds" in c else c.get("graph_error", "")[:60]
        wrong = str(c["wrong"]) if "wrong" in c else "no result"
        rows.append([c["name"], duration(c["seconds"]), graph, wrong, str(c["runs"])])
    return table(rows, ["", "a call", "launches alone", "wrong rows", "rounds"])


def _times(results: list[dict[str, Any]]) -> str:
    return _contests("Times", results)


def _contests(title: str, results: list[dict[str, Any]]) -> str:
    parts = []
    for record in results:
        name = f"**{record['what']}, {_where(record)}**"
        if "contestants" in record:
            parts += [name, "", _contest(record), ""]
        else:
            parts += [f"{name}: {record.get('kept') or _reason(record)}", ""]
    return "\n".join([f"## {title}", "", *parts]) if parts else ""


def _prediction(results: list[dict[str, Any]]) -> str:
    rows = []
    for record in results:
        if "searches" not in record:
            rows.append([_where(record), _reason(record), "", "", ""])
            continue
        for name, s in record["searches"].items():
            cells = [duration(s[key]) for key in ("measured", "predicted", "serial")]
            rows.append([_where(record), name, *cells])
    if not rows:
        return ""
    headers = ["N x K x D", "", "measured", "predicted if all overlaps", "if matrix units and epilogue don't"]
    return f"## Prediction\n\n{table(rows, headers)}\n"


def _published() -> str:
    return f"""## Published by others

Not measured here: what the authors state, on the device that they name.

{table(PUBLISHED, ["", "N x K x D", "device", "time"])}
"""


def _failures(document: dict[str, Any]) -> str:
    parts = []
    for step in document["steps"]:
        if step["status"] in ("failed", "timed out") and step.get("tail"):
            parts += [
                f"**{step['name']}**: {step['status']}, {step['reason']}",
                "",
                "```",
                step["tail"].strip(),
                "```",
                "",
            ]
    return "\n".join(["## Steps that failed", "", *parts]) if parts else ""
