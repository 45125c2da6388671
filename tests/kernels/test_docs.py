"""The figures of docs/gpu.md are those that were counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fastvq.kernels

ROOT = Path(__file__).parents[2]


def counted():
    """{(target, packed columns): instructions a distance} of the first scan of float32 rows."""
    document = json.loads((Path(fastvq.kernels.__file__).parent / "counts.json").read_text())
    found = {}
    for record in document["records"]:
        config = record["config"]
        if record["kernel"] == "_scan" and config["TERMS"] == 1 and not config["SPLIT"]:
            found[record["target"], config["BLOCK_D"] * config["CHUNKS"]] = record["alu"]
    return found


def test_instructions_a_distance():
    text = (ROOT / "docs" / "gpu.md").read_text()
    head, *_ = re.findall(r"^\| packed columns \|(.*)\|$", text, re.M)
    targets = [target.strip() for target in head.split("|")]
    rows = re.findall(r"^\| (\d+)(?: \(.*?\))? \|((?: \d+\.\d+ \|)+)$", text, re.M)
    shown = {
        (target, int(columns)): float(value)
        for columns, values in rows
        for target, value in zip(targets, values.strip(" |").split("|"), strict=True)
    }
    expected = {key: value for key, value in counted().items() if key[0] in targets}
    assert set(shown) == set(expected)
    for key, value in expected.items():
        assert abs(shown[key] - value) <= 0.0051, key


def test_the_span_in_the_readme():
    values = [value for (target, _), value in counted().items() if target.startswith("sm_")]
    readme = (ROOT / "README.md").read_text()
    low, high, worst = re.search(
        r"([\d.]+) to ([\d.]+) instructions a distance on NVIDIA \(([\d.]+) at", readme
    ).groups()
    assert (float(low), float(worst)) == (round(min(values), 1), round(max(values), 1))
    assert float(high) == round(sorted(values)[-2], 1)
