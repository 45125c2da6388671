"""Tests that run on the device: each result on disk at once, and a crash costs one test."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run import python
from .step import NO_TIME, Context


def gpu_tests(context: Context) -> None:
    """Run the tests that are marked `gpu`."""
    run_tests(context, context.sizes.tests, "gpu")


def kernel_tests(context: Context) -> None:
    """Run the tests of the Triton kernels that the interpreter runs where there is no GPU."""
    run_tests(context, context.sizes.kernel_tests, "not gpu and not machine")


def run_tests(context: Context, files: Sequence[str], marker: str) -> None:
    """Run tests; after a crash, or where the device is lost, the remaining ones in another process.

    Raises:
        RuntimeError: pytest ends without having run a test.
    """
    record = context.work / f"{context.results.name}.lines"
    record.unlink(missing_ok=True)
    before: dict[str, dict[str, Any]] = {}
    while True:
        code = _pytest(context, files, marker, record, list(before))
        found = results(record)
        if code in (0, 1, 5) or len(found) == len(before):
            break
        before = found
    if not found or code not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with {code} after {len(found)} tests; its output is in the log")


def _pytest(context: Context, files: Sequence[str], marker: str, record: Path, done: Sequence[str]) -> int:
    command = python(
        "-m", "pytest", "-q", "--tb=short", "-m", marker, "-p", "no:cacheprovider", "-p", "fastvq.bench.gpu.recorder"
    )
    command += ["--rootdir", str(context.root), "-c", str(context.root / "pyproject.toml")]
    command.append("--continue-on-collection-errors")
    for name in done:
        command += ["--deselect", name]
    command += [str(context.root / name) for name in files]
    process = subprocess.Popen(command, cwd=context.work, env=os.environ | {"RECORD_OF_TESTS": str(record)})
    while context.left() > 0:
        try:
            code = process.wait(timeout=min(1.0, context.left()))
        except subprocess.TimeoutExpired:
            context.replace(list(results(record).values()))
        else:
            context.replace(list(results(record).values()))
            return code
    process.kill()
    process.wait()
    context.replace([*results(record).values(), {"test": "the others", "outcome": "not run", "text": NO_TIME}])
    return 0


def results(record: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each test."""
    found: dict[str, dict[str, Any]] = {}
    if record.exists():
        for line in record.read_text().splitlines():
            result = json.loads(line)
            found[result["test"]] = result
    return found
