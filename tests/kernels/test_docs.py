"""The figures of docs/gpu.md are those that were counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fastvq.kernels
from fastvq.bench import cuda_model, model
from fastvq.bench.data import Shape

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


def table(head):
    """{row: {column: number}} of the table of docs/gpu.md that begins like that."""
    text = (ROOT / "docs" / "gpu.md").read_text()
    _, columns, rows = re.search(rf"^\| ({re.escape(head)}) \|(.*)\|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, re.M).groups()
    names = [column.strip() for column in columns.split("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {first: dict(zip(names, map(float, rest), strict=True)) for first, *rest in cells}


SCANS = {"cores, D to 4": (4, 0), "cores, D to 8": (8, 0), "cores, D to 16": (16, 0)}
MATRIX = {"D to 16": 16, "D to 32": 32, "D to 64": 64, "streamed": 1024}
SCANS |= {f"matrix units, {name}": (dim, 1) for name, dim in MATRIX.items()}
SCANS |= {f"three products, {name}": (dim, 3) for name, dim in MATRIX.items() if dim != 64}


def test_instructions_of_the_cuda_scans():
    counts = cuda_model.load_cuda_counts()
    shown = table("scan")
    assert set(shown) == set(SCANS)
    for name, (dim, products) in SCANS.items():
        for target, value in shown[name].items():
            device = next(device for device in model.DEVICES.values() if device.target == target)
            assert value == pytest.approx(cuda_model.scan_for(counts, device, dim, products)["alu"], abs=0.0051), name


def test_lanes_a_distance():
    counts, shown = cuda_model.load_cuda_counts(), table("prediction, lanes a distance")
    many = Shape(1 << 20, 1 << 20, 16)
    for name in ("a100", "h100", "b200"):
        device = model.DEVICES[name]
        lanes = device.issue / (many.n * many.k)
        expected = {}
        for scan in ("cores, D to 4", "cores, D to 8", "cores, D to 16"):
            record = cuda_model.scan_for(counts, device, *SCANS[scan])
            expected[scan] = cuda_model.scan_terms(device, record, many, many.n).overlapped
        for scan in ("D to 16", "D to 32", "D to 64"):
            record = cuda_model.scan_for(counts, device, MATRIX[scan], 1)
            terms = cuda_model.scan_terms(device, record, many._replace(d=MATRIX[scan]), many.n)
            for what, term in (("instructions", "epilogue"), ("products", "matrix"), ("shared memory", "shared")):
                expected[f"matrix units, {scan}: {what}"] = getattr(terms, term)
        triton = model.scan_for(model.load_counts(), device.target, 13, 1)
        expected["Triton's scan, D to 13"] = model.scan_terms(device, triton, many._replace(d=13), many.n).overlapped
        flash, _, cuvs, _ = (model.rival_terms(device, rival, many).overlapped for rival in model.RIVALS)
        expected["flash-kmeans as published"] = flash
        expected["cuVS as published, three products of tf32, D to 16"] = cuvs
        assert set(shown) == set(expected)
        for row, seconds in expected.items():
            assert shown[row][name.upper()] == pytest.approx(lanes * seconds, abs=0.011), (row, name)
