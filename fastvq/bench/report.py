"""docs/benchmarks.md, its plots and the README's figures, rendered from the suite's JSON document alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastvq.files import StrPath, write_whole
from fastvq.runs.figures import SERIES, figure_with, save_figure

from .peers import NATIVE, PRODUCT, TRITON
from .suite import SCALING
from .targets import lead, outcomes, seconds_by_name

REAL = "latents"
"""The data that stand for what people quantize."""
DOCUMENT, PAGE, IMAGES = "benchmarks.json", "benchmarks.md", "images"
_MARKER = re.compile(r"(<!-- bench:([\w.-]+) -->).*?(<!-- /bench -->)", re.S)
_TINY, _SMALL = 1e-3, 1.0


def write_report(document: dict[str, Any], folder: StrPath, readme: StrPath | None = None) -> list[Path]:
    """Write the document, its page and its plots to `folder`, and the figures into a README with markers.

    Every file is written to a temporary name first, and the document before what is made of it: a suite takes minutes,
    and `render` makes the rest. Returns the paths.
    """
    folder, readme = Path(folder), None if readme is None else Path(readme)
    images = folder / IMAGES
    write_whole(folder / DOCUMENT, json.dumps(document, indent=1) + "\n")
    plots = [
        plot_search(document, images / "bench_search.png"),
        plot_scaling(document, images / "bench_scaling.png"),
        plot_roofline(document, images / "bench_roofline.png"),
    ]
    texts = {folder / PAGE: page(document)}
    if readme is not None and readme.exists():
        texts[readme] = with_figures(readme.read_text(), document)
    for path, text in texts.items():
        write_whole(path, text)
    return [folder / DOCUMENT, *texts, *plots]


def table(rows: list[list[str]], headers: list[str]) -> str:
    """Return a table that is Markdown and readable as plain text."""
    widths = [max(len(header) + 2, *(len(row[i]) for row in rows), 0) for i, header in enumerate(headers)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    head = "| " + " | ".join(cell.ljust(w) for cell, w in zip(headers, widths, strict=True)) + " |"
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])


def duration(seconds: float) -> str:
    """Return a duration with a suitable unit."""
    if seconds < _TINY:
        return f"{1e6 * seconds:.0f} us"
    return f"{1e3 * seconds:.3g} ms" if seconds < _SMALL else f"{seconds:.2f} s"


def search_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return one row for each contestant: name, time, GFLOP/s, multiple of fastvq's time, wrong indices."""
    contestants = record["contestants"]
    seconds = seconds_by_name(record)
    own = seconds.get(TRITON, seconds.get(NATIVE))
    rows = []
    for c in contestants:
        if "not_run" in c:
            rows.append([c["name"], f"not run: {c['not_run']}", "", "", ""])
            continue
        relative = f"{c['seconds'] / own:.2f}" if own else ""
        wrong = f"{c['wrong']} of {c['checked']}" if "wrong" in c else "no indices"
        rows.append([c["name"], duration(c["seconds"]), f"{c['gflops']:.0f}", relative, wrong])
    return rows


SEARCH_HEADERS = ["", "median", "GFLOP/s", "time / fastvq", "wrong indices"]


def page(document: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    sections = [_head(document), _targets(document), _searches(document), _steps(document), _small(document)]
    return "\n".join([*sections, _memory(document), _roofline(document), _scaling(document), _gpu(document)])


def _head(document: dict[str, Any]) -> str:
    m, c = document["machine"], document["ceilings"]
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in m["versions"].items())
    peaks = ", ".join(
        f"{name} {c[kind]:.0f} {unit}" if c[kind] else f"{name}: not applicable"
        for kind, name, unit in (
            ("float32", "float32 multiply-adds", "GFLOP/s"),
            ("bfloat16", "bfloat16 dot products", "GFLOP/s"),
            ("int16", "int16 dot products", "GFLOP/s"),
            ("read", "reading memory", "GB/s"),
        )
    )
    return f"""# Benchmarks

Rendered from [{DOCUMENT}]({DOCUMENT}), which `{m["command"]}` wrote on {m["date"]}; don't edit.

- Machine: {m["processor"]}, {m["cores"]} cores, {m["threads"]} threads for every contestant.
- Native code: {m["instruction_set"]}.
- fastvq {m["fastvq"]}, commit {m["commit"] or "unknown"} (+ marks local changes); {versions}.
- Ceilings, measured in the same run: {peaks}.

Times are medians over interleaved turns; a turn of a short call consists of many consecutive ones. The indices of each
contestant are checked first, in the same run, against the float64 definition: on all rows, or on as many as the tables
say, spread over the whole batch. fastvq must have none wrong, others may. GFLOP/s count 2 N K D operations, independent
of what a method computes.
"""


def _targets(document: dict[str, Any]) -> str:
    found = outcomes(document)
    rows = [[o.against, o.on, o.wanted, o.measured, o.verdict] for o in found]
    reasons = "".join(f"- {o.on}, against {o.against}: {o.why}.\n" for o in found if o.met is False and o.why)
    explained = f"\nBehind those that are not met, measured in the same run:\n\n{reasons}" if reasons else ""
    return f"""## Targets

{table(rows, ["against", "on", "at least", "measured", ""])}
{explained}
The low-precision tier is int16, not bfloat16: it rounds less, at the same rate or a higher one
([decisions.md](decisions.md)).
"""


def _searches(document: dict[str, Any]) -> str:
    parts = [
        "## Search\n",
        f"![Search: how many times faster than the fastest peer]({IMAGES}/bench_search.png)\n",
        "Gaussian data have no structure; clustered data lie around their codes; latents are those of a VQ-VAE\n"
        "trained on Fashion-MNIST; directed data are rotated normal vectors with the spectrum of latents. Audio are\n"
        "the vectors that the first and the third residual stage of a small audio codec quantize. `torch.mm alone` is\n"
        "the bare product into a preallocated output, not a search. faiss SuperKMeans is one of the later iterations\n"
        "of faiss's k-means: it begins with the nearest codes before all moved by a tenth of the distance to them,\n"
        f"and may miss the nearest.{_again(document, 'audio')}\n",
    ]
    for title, records in (("", document["search"]), ("### Other shapes\n", document["other"])):
        if title:
            parts.append(title)
        for r in records:
            parts.append(f"**N={r['n']}, K={r['k']}, D={r['d']}, {r['data']}**\n")
            parts.append(table(search_rows(r), SEARCH_HEADERS) + "\n")
    return "\n".join(parts)


def _steps(document: dict[str, Any]) -> str:
    rows = []
    for r in document["steps"]:
        name = f"{r['stages']} stages, " if r["stages"] else ""
        name += f"N={r['n']} K={r['k']} D={r['d']}"
        if "not_run" in r:
            rows.append([name, f"not measured: {r['not_run']}", "", ""])
        else:
            own, peer = r["seconds"].values()
            rows.append([name, duration(own), duration(peer), f"{r['ratio']:.1f} x"])
    return f"""## Training step

Forward, backward and codebook update of `VectorQuantize` and `ResidualVQ`, with vector_quantize_pytorch's defaults.

{table(rows, ["", "fastvq", "vector_quantize_pytorch", "faster"])}
"""


def _again(document: dict[str, Any], part: str) -> str:
    """Return when a part of the document was measured, where that was later than the rest."""
    again = document.get("again", {}).get(part)
    return f" Measured again on {again['date']}, at commit {again['commit']}." if again else ""


def _small(document: dict[str, Any]) -> str:
    records = document.get("small", [])  # which documents of earlier versions lack
    parts, reasons = [], dict[str, None]()
    for what, k, d, stages in dict.fromkeys((r["what"], r["k"], r["d"], r["stages"]) for r in records):
        found = {r["n"]: r for r in records if (r["what"], r["k"], r["d"], r["stages"]) == (what, k, d, stages)}
        by_name: dict[str, list[str]] = {}
        for c in (c for r in found.values() for c in r["contestants"]):
            wrong = f", {c['wrong']} wrong" if c.get("wrong") else ""
            by_name.setdefault(c["name"], []).append(duration(c["seconds"]) + wrong if "seconds" in c else "-")
            reasons |= {f"{c['name']}: {c['not_run']}": None} if "not_run" in c else {}
        title = f"{what}, K={k} D={d} Q={stages}"
        parts.append(table([[name, *cells] for name, cells in by_name.items()], [title, *(f"N={n}" for n in found)]))
    left_out = f"\nNot run: {'; '.join(reasons)}.\n" if reasons else ""
    tables = "\n\n".join(parts) or "Not measured."
    return f"""## Small batches

Encoding and decoding of N vectors by Q residual stages of K codes: the op on a stack, with a `PackedCodebook` that is
packed before, and the layer in eval; beside a loop of `addmm` and `argmin` with squared norms that are computed once,
`embedding_bag` on one table, and the quantizers of transformers with the same codebooks. "wrong" counts rows with an
index, or an output, that the definition doesn't have; fastvq must have none. DAC searches for unit vectors, so that its
indices are not compared.{_again(document, "small")}

{tables}
{left_out}"""


def _memory(document: dict[str, Any]) -> str:
    parts: list[str] = []
    reasons: dict[str, None] = {}
    for what, title in (("search", "a search"), ("step", "a training step")):
        records = [r for r in document["memory"] if r["what"] == what]
        names = list(dict.fromkeys(r["name"] for r in records))
        shapes = list(dict.fromkeys((r["n"], r["k"], r["d"]) for r in records))
        found = {(r["name"], r["n"], r["k"], r["d"]): r for r in records}
        rows = []
        for n, k, d in shapes:
            cells = [found[name, n, k, d] for name in names]
            taken = [f"{r['bytes'] / 1e6:.1f}" if "bytes" in r else "-" for r in cells]
            reasons |= {f"{r['name']}: {r['not_run']}": None for r in cells if "not_run" in r}
            rows.append([f"{n} x {k} x {d}", f"{4e-6 * (n + k) * d:.1f}", f"{4e-6 * n * k:.0f}", *taken])
        parts.append(table(rows, [title, "x and codes", "N x K matrix", *names]))
    left_out = f"\nNot measured: {'; '.join(reasons)}.\n" if reasons else ""
    return f"""## Memory

MB that a process takes during its first call beyond what it held before, at its peak, beside what the vectors and the
codes take and what a matrix of all distances would.

{parts[0]}

{parts[1]}
{left_out}"""


def _roofline(document: dict[str, Any]) -> str:
    rows = [
        [
            f"{p['n']} x {p['k']} x {p['d']}, {p['data']}",
            f"{p['intensity']:.3g}",
            "arithmetic" if p["compute"] <= p["bandwidth"] else "memory",
            f"{p['roof']:.0f}",
            f"{p['gflops']:.0f}",
            f"{p['gflops'] / p['roof']:.0%}",
        ]
        for p in _roofs(document)
    ]
    return f"""## Distance from the roofline

![Roofline: rate against operations a byte]({IMAGES}/bench_roofline.png)

The roof is the lower of two rates, both measured in this run: the peak of int16 dot products (of float32 multiply-adds
without such instructions), and the rate at which x and the codebook can be read once from memory. Data that stay in a
cache between calls can exceed the memory's roof.

{table(rows, ["N x K x D", "operations / byte", "bound by", "roof, GFLOP/s", "fastvq native", "share"])}
"""


def _roofs(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a point of the roofline for each search by the native backend: its intensity, its rate and its roof."""
    c = document["ceilings"]
    compute = c["int16"] or c["float32"]
    points = []
    for r in document["search"]:
        rates = {x["name"]: x["gflops"] for x in r["contestants"] if "gflops" in x}
        if NATIVE not in rates or compute is None or c["read"] is None:
            continue
        n, k, d = r["n"], r["k"], r["d"]
        intensity = 2 * n * k * d / (4 * (n * d + k * d) + 8 * n)
        bandwidth = intensity * c["read"]
        point = {"n": n, "k": k, "d": d, "data": r["data"], "intensity": intensity, "gflops": rates[NATIVE]}
        points.append(
            point
            | {
                "compute": compute,
                "bandwidth": bandwidth,
                "roof": min(compute, bandwidth),
                "product": rates.get(PRODUCT),
            }
        )
    return points


def _scaling(document: dict[str, Any]) -> str:
    rows = [
        [
            str(r["threads"]),
            f"{r['gflops']:.0f}",
            *(f"{r['ceilings'][k]:.0f}" if r["ceilings"][k] else "-" for k in _CEILINGS),
        ]
        for r in document["threads"]
    ]
    return f"""## Scaling

![Time against N, K, D and threads]({IMAGES}/bench_scaling.png)

GFLOP/s by threads, at N=16384 K=8192 D=64:

{table(rows, ["threads", "fastvq native", "float32 peak", "int16 peak"])}
"""


_CEILINGS = ("float32", "int16")


def _gpu(document: dict[str, Any]) -> str:
    gpu = document["machine"]["gpu"]
    if gpu:
        return f"## GPU\n\nOn {gpu}; times by device events.\n"
    return """## GPU

Not measured: this machine has none. With a GPU, `fastvq bench --device cuda` times the triton and torch
backends by device events beside torch.compile, flash-kmeans and cuVS, if these are installed, and prints the
prediction of `fastvq bench --model`; [gpu.md](gpu.md) describes what is known without one.
"""


def plot_search(document: dict[str, Any], path: StrPath) -> Path:
    """Plot how many times faster fastvq is than the fastest peer, as bars by shape."""
    shapes = list(dict.fromkeys((r["n"], r["k"], r["d"]) for r in document["search"] + document["other"]))
    figure, axes = figure_with(
        9.5,
        6.0,
        "Nearest-code search: fastvq against the fastest peer",
        "Bars beyond 1 mean that fastvq needs less time than the fastest of the other searches on that shape and data.",
    )
    kinds = list(dict.fromkeys(r["data"] for r in document["search"]))
    height = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        found = {
            (r["n"], r["k"], r["d"]): lead(r, document["machine"]["peers"])
            for r in document["search"] + document["other"]
            if r["data"] == kind
        }
        leads = [(p, ahead[0]) for p, s in enumerate(shapes) if (ahead := found.get(s))]
        axes.barh(
            [p + i * height for p, _ in leads], [ratio for _, ratio in leads], height, label=kind, color=SERIES[i]
        )
    axes.set_yticks([p + 0.4 - height / 2 for p in range(len(shapes))], [f"{n} x {k} x {d}" for n, k, d in shapes])
    axes.invert_yaxis()
    axes.axvline(1.0, color="#777777", linewidth=1)
    axes.set_xlabel("times faster than the fastest peer")
    axes.set_ylabel("N x K x D")
    axes.legend(loc="lower right", frameon=False)
    save_figure(figure, path)
    return Path(path)


def plot_roofline(document: dict[str, Any], path: StrPath) -> Path:
    """Plot the rates of the native backend and of torch.mm against operations a byte, under the measured roofs."""
    figure, axes = figure_with(
        9.5,
        6.0,
        "Roofline of the search",
        "Operations are 2 N K D; bytes are those of x, the codebook and the indices, once each. Lines: the measured"
        " peaks of arithmetic and the measured rate of reading memory. Points left of the bend can lie above the line"
        " where the data come from a cache.",
    )
    points, ceilings = _roofs(document), document["ceilings"]
    for color, kind in zip(SERIES, dict.fromkeys(p["data"] for p in points), strict=False):
        places = [(p["intensity"], p["gflops"]) for p in points if p["data"] == kind]
        axes.plot(*zip(*places, strict=True), "o", color=color, label=f"fastvq native, {kind}")
    products = [(p["intensity"], p["product"]) for p in points if p["product"]]
    if products:
        axes.plot(*zip(*products, strict=True), "x", color="#999999", label="torch.mm alone")
    if points:
        edges = [0.5 * min(p["intensity"] for p in points), 2 * max(p["intensity"] for p in points)]
        for kind, style in zip(_CEILINGS, _CEILING_STYLES, strict=True):
            if peak := ceilings[kind]:
                bend = peak / ceilings["read"]
                line = [edges[0], min(max(bend, edges[0]), edges[1]), edges[1]]
                rates = [min(peak, at * ceilings["read"]) for at in line]
                axes.plot(line, rates, style, linewidth=1, color="#555555", label=f"{kind} peak, memory")
        lowest = 0.2 * min(p["gflops"] for p in points)
        at = 0.0
        for intensity, name in sorted({(p["intensity"], f"{p['n']} x {p['k']} x {p['d']}") for p in points}):
            at = max(intensity, _LABEL_STEP * at)
            axes.annotate(name, (at, 1.1 * lowest), rotation=90, fontsize=7, ha="center", color="#777777")
        axes.set_ylim(lowest, None)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [tick for tick in _RATES if low <= tick <= high]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("operations / byte")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.25)
    if points:
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    save_figure(figure, path)
    return Path(path)


_RATES = tuple(step * 10**power for power in range(5) for step in (1, 3))
_LABEL_STEP = 1.17
"""Ratio of the places of two labels on a logarithmic axis that don't overlap."""


def plot_scaling(document: dict[str, Any], path: StrPath) -> Path:
    """Plot time against N, K, D and threads in four panels, with the least time that the machine's peaks allow."""
    figure, panels = figure_with(
        13.0,
        4.8,
        "Search of clustered data: time against each size",
        "Around N=16384, K=1024, D=64; threads at K=8192. Dashed: the time that 2 N K D operations take at the peaks of"
        " float32 and int16 arithmetic, measured in the same run. Below that of float32 no plain product can come.",
        columns=4,
    )
    for axes, axis in zip(panels, SCALING, strict=False):
        records = document["scaling"][axis]
        for i, name in enumerate(records[0]["gflops"]):
            points = [(r[axis.lower()], _milliseconds(r, r["gflops"][name])) for r in records if r["gflops"].get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=SERIES[i], label=name)
        for kind, style in zip(_CEILINGS, _CEILING_STYLES, strict=True):
            if peak := document["ceilings"][kind]:
                line = [(r[axis.lower()], _milliseconds(r, peak)) for r in records]
                axes.plot(*zip(*line, strict=True), style, linewidth=1, color="#555555", label=f"{kind} peak")
        axes.set_xlabel(axis)
    records = document["threads"]
    counts = [r["threads"] for r in records]
    panels[3].plot(counts, [_milliseconds(r, r["gflops"]) for r in records], marker="o", markersize=3, color=SERIES[0])
    for kind, style in zip(_CEILINGS, _CEILING_STYLES, strict=True):
        if all(r["ceilings"][kind] for r in records):
            least = [_milliseconds(r, r["ceilings"][kind]) for r in records]
            panels[3].plot(counts, least, style, linewidth=1, color="#555555")
    panels[3].set_xlabel("threads")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    panels[3].set_xticks(counts, [str(count) for count in counts])
    panels[3].minorticks_off()
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=8, frameon=False, loc="upper left")
    save_figure(figure, path)
    return Path(path)


_CEILING_STYLES = ("--", ":")


def _milliseconds(record: dict[str, Any], gflops: float) -> float:
    """Return the time of 2 N K D operations at a rate."""
    return 2e-6 * record["n"] * record["k"] * record["d"] / gflops


def figures(document: dict[str, Any]) -> dict[str, str]:
    """Return the figures that other pages may quote, by name."""
    named: dict[str, str] = {}
    for r in document["search"]:
        name = f"{r['n']}-{r['k']}-{r['d']}-{r['data']}"
        if NATIVE in (seconds := seconds_by_name(r)):
            named[f"search-{name}"] = duration(seconds[NATIVE])
        if found := lead(r, document["machine"]["peers"]):
            named[f"lead-{name}"] = f"{found[0]:.1f} times"
        if found := lead(r, [PRODUCT]):
            named[f"product-{name}"] = f"{found[0]:.1f} times"
    for r in document["steps"]:
        if "ratio" in r:
            named[f"step-{r['n']}-{r['k']}-{r['d']}-{r['stages']}"] = f"{r['ratio']:.0f} times"
    for r in document["memory"]:
        if "bytes" in r:
            name = f"{r['what']}-{r['name'].replace(' ', '-')}-{r['n']}-{r['k']}-{r['d']}"
            named[f"memory-{name}"] = f"{r['bytes'] / 1e6:.0f} MB"
    named["speed"] = f"\n\n{speed_table(document)}\n\n"
    return named


def speed_table(document: dict[str, Any]) -> str:
    """Render the README's table: some searches and all training steps, beside the fastest other contestants.

    A search is that of latents at a shape where there are some.
    """
    rows = []
    real = {(r["n"], r["k"], r["d"]) for r in document["search"] if r["data"] == REAL}
    for r in document["search"]:
        size = (r["n"], r["k"], r["d"])
        seconds = seconds_by_name(r)
        kind = REAL if size in real else "clustered"
        if size not in _README_SEARCHES or r["data"] != kind or NATIVE not in seconds:
            continue
        product, other = lead(r, [PRODUCT]), lead(r, document["machine"]["peers"])
        rows.append(
            [
                "{}, {} x {} x {}".format(kind, *size),
                duration(seconds[NATIVE]),
                f"{product[0]:.1f} x" if product else "",
                f"{other[0]:.1f} x, {other[1]}" if other else "",
            ]
        )
    for r in document["steps"]:
        if "ratio" in r:
            layer = f"{r['stages']}-stage ResidualVQ" if r["stages"] else "VectorQuantize"
            own, _ = r["seconds"].values()
            name = f"{layer}, {r['n']} x {r['k']} x {r['d']}"
            rows.append([name, duration(own), "", f"{r['ratio']:.0f} x, vector_quantize_pytorch"])
    return table(rows, ["N x K x D", "fastvq", "torch.mm", "fastest other"])


_README_SEARCHES = ((16384, 512, 64), (16384, 8192, 64), (16384, 8192, 256))


def with_figures(text: str, document: dict[str, Any]) -> str:
    """Return `text` with each marked figure replaced by the current one of that name.

    A figure is marked by `<!-- bench:NAME -->` before and `<!-- /bench -->` after it.

    Raises:
        KeyError: there is no figure of that name.
    """
    named = figures(document)
    return _MARKER.sub(lambda match: match[1] + named[match[2]] + match[3], text)
