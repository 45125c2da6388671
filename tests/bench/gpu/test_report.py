"""The page of a run, from whole, partial and failed documents."""

from __future__ import annotations

import copy
import json

import pytest

from fastvq.bench.gpu import report
from fastvq.bench.gpu.run import _unreached
from fastvq.bench.gpu.steps import STEPS
from fastvq.cli.main import main

SEARCH = {
    "what": "search", "n": 65536, "k": 1024, "d": 64, "data": "clustered", "inputs": 15,
    "contestants": [
        {"name": "fastvq triton", "wrong": 0, "seconds": 3e-4, "least": 3e-4, "runs": 9, "graph_seconds": 1e-4},
        {"name": "fastvq native", "wrong": 0, "seconds": 2e-4, "least": 2e-4, "runs": 9, "graph_error": "Error: sync"},
        {"name": "addmm + argmin", "wrong": 12, "seconds": 5e-4, "least": 5e-4, "runs": 9, "graph_seconds": 4e-4},
        {"name": "cdist + argmin", "error": "OutOfMemoryError: too large"},
        {"name": "torch.mm alone", "seconds": 2e-4, "least": 2e-4, "runs": 9, "graph_seconds": 2e-4},
        {"name": "torch.mm alone, tf32", "seconds": 1e-5, "least": 1e-5, "runs": 9},
        {"name": "cuVS", "not_run": "cuvs isn't installed"},
    ],
}  # fmt: skip
RESULTS = {
    "machine": [
        {"what": "versions", "versions": {"torch": "2.11.0", "nvcc": None}, "processor": "P", "cores": 16},
        {"what": "device", "name": "NVIDIA H200", "capability": "9.0", "units": 132},
        {"what": "clocks at rest", "driver_version": "580.1", "clocks.sm": "345 MHz", "clocks.max.sm": "1980 MHz"},
        {"what": "product of float16 matrices", "tflops": 788.4, "side": 8192},
        {"what": "copy", "terabytes": 4.31},
    ],
    "exact-triton": [
        {"what": "search", "data": "gaussian", "searches": 14, "rows": 5000, "wrong": 0},
        {"what": "search", "data": "offset", "searches": 14, "rows": 5000, "wrong": 3, "first": "float32 (5, 3)"},
        {"what": "search", "data": "zeros", "not_run": "no time left in this step"},
        {"what": "residual_search", "data": "zeros", "error": "RuntimeError: broken"},
    ],
    "full-cuda": [{"what": "search", "n": 1, "k": 2, "d": 3, "dtype": "float32", "rows": 1, "wrong": 0}],
    "tests": [
        {"test": "a.py::one", "outcome": "passed", "seconds": 1.0},
        {"test": "a.py::two", "outcome": "failed", "seconds": 1.0, "text": "lines\nE  assert 1 == 2"},
        {"test": "a.py::three", "outcome": "crashed"},
    ],
    "times": [SEARCH, {"what": "training step", "n": 1, "k": 2, "d": 3, "not_run": "no time left"}],
    "autotune": [{**SEARCH, "what": "candidates"}, {"what": "FASTVQ_AUTOTUNE=1", "n": 1, "k": 2, "d": 3, "kept": "{}"}],
    "prediction": [
        {
            "what": "search", "n": 65536, "k": 1024, "d": 64, "data": "clustered", "sheet": "h200",
            "searches": {"fastvq triton": {"measured": 1e-4, "predicted": 5e-5, "serial": 6e-5}},
        },
        {"what": "search", "n": 1, "k": 2, "d": 3, "data": "gaussian", "not_run": "no data sheet"},
    ],
}  # fmt: skip


@pytest.fixture
def document():
    steps = [_unreached(step) | {"results": copy.deepcopy(RESULTS.get(step.name, []))} for step in STEPS]
    for step in steps:
        step |= {"status": "done", "reason": "", "seconds": 5.0, "limit": 9.0, "tail": ""}
    steps[1] |= {"status": "failed", "reason": "exit status 1", "tail": "nvcc: no luck\n"}
    head = {"command": "python -m fastvq.bench.gpu out", "date": "2026-01-01", "fastvq": "0.1.0", "rehearsal": False}
    return head | {"budget": 540.0, "steps": steps, "seconds": 70.0}


def cells(page, *first):
    """Return the cells of the row of a table that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    (row,) = [row for row in rows if tuple(row[: len(first)]) == first and len(row) > len(first)]
    return row


def test_the_summary_has_the_launches_alone_and_everybodys_mistakes(document):
    page = report.page(document)
    summary = page[page.index("## Summary") : page.index("## Exactness")]
    assert cells(summary, "search")[2:] == [
        "100 us (fastvq triton)",
        "4.00 x, addmm + argmin, 12 rows WRONG",
        "2.00 x",
        "50 us",
        "300 us",
    ]
    assert cells(summary, "training step")[2] == "not run: no time left"


def test_all_results_are_on_the_page(document):
    page = report.page(document)
    assert "NVIDIA H200, compute capability 9.0, 132 multiprocessors, driver 580.1" in page
    assert "float16 788 TFLOP/s, copy 4.31 TB/s" in page
    assert "torch 2.11.0, nvcc (missing)" in page
    found = cells(page, "indices of Triton, adversarial set", "search")
    assert found[2:] == ["28", "10000", "3", "1"]
    assert "offset : float32 (5, 3)" in page
    assert "zeros : RuntimeError: broken" in page
    assert "1 crashed, 1 failed, 1 passed" in page
    assert "failed: `a.py::two` E  assert 1 == 2" in page
    assert "OutOfMemoryError: too large" in page
    assert "not run: cuvs isn't installed" in page
    assert "nvcc: no luck" in page
    assert "rehearsal" not in page
    document["rehearsal"] = True
    assert report.REHEARSED in report.page(document)


def test_any_part_of_a_run_can_be_rendered(document):
    """Cut after each result, as a kill leaves it."""
    whole = document["steps"]
    for place, step in enumerate(whole):
        for count in range(len(step["results"]) + 1):
            cut = [_unreached(s) for s in STEPS]
            cut[:place] = whole[:place]
            cut[place] |= {"status": "cut off", "reason": "", "limit": 9.0, "results": step["results"][:count]}
            page = report.page(document | {"steps": cut})
            assert "cut off" in page
            assert page.count("the run ended before this step") == len(STEPS) - place - 1


def test_render_writes_the_page_of_the_stored_document(document, tmp_path, capsys):
    (tmp_path / report.SOURCE).write_text(json.dumps(document))
    assert main(["bench", "--render", f"--out={tmp_path}"]) == 0
    assert (tmp_path / report.TARGET).read_text() == report.page(document)
    assert str(tmp_path / report.TARGET) in capsys.readouterr().out


def test_a_rehearsal_is_not_rendered_into_the_documents(document, tmp_path, capsys):
    (tmp_path / report.SOURCE).write_text(json.dumps(document | {"rehearsal": True}))
    assert main(["bench", "--render", f"--out={tmp_path}"]) == 2
    assert "gpu.json is a rehearsal on a CPU" in capsys.readouterr().err
    assert not (tmp_path / report.TARGET).exists()
