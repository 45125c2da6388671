"""Predictions of the model beside what was measured."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from fastvq.bench import model
from fastvq.bench.data import Shape
from fastvq.bench.devices import DEVICES

from .run import DOCUMENT
from .step import Context

PREDICTED = {
    "fastvq triton": f"search, {model.UNCERTIFIED_SHARE:.3g} of the rows uncertified",
    "fastvq native": model.CUDA,
}
"""Contestants, and what the model calls them."""


def compare(context: Context) -> None:
    """Predict each search that was timed, by the data sheet of the device.

    Raises:
        LookupError: there is no document of the run, or no time in it.
    """
    document = json.loads((context.results.parent / DOCUMENT).read_text())
    results = {step["name"]: step["results"] for step in document["steps"]}
    name = next((r.get("name") or "" for r in results["machine"] if r.get("what") == "device"), "")
    searches = [r for r in results["times"] if r.get("what") == "search" and "contestants" in r]
    if not searches:
        raise LookupError("no search was timed")
    for record in searches:
        names = {key: record[key] for key in ("n", "k", "d", "data")}
        context.case(partial(beside, name, record), what="search", **names)


def beside(device: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return measured and predicted seconds of fastvq's contestants; the prediction is the best that could happen."""
    key = next((key for key, sheet in DEVICES.items() if sheet.reported in device), None)
    if key is None:
        return {"not_run": f"there is no data sheet of {device!r}"}
    totals = model.predict(key, Shape(record["n"], record["k"], record["d"]))["totals"]
    measured = {c["name"]: c.get("graph_seconds", c.get("seconds")) for c in record["contestants"]}
    found = {
        name: {"measured": measured[name], "predicted": totals[title]["overlapped"], "serial": totals[title]["serial"]}
        for name, title in PREDICTED.items()
        if measured.get(name) is not None and title in totals
    }
    return {"sheet": key, "searches": found}
