"""Plugin of pytest that writes each test's result at once: `pytest -p fastvq.bench.gpu.recorder`.

RECORD_OF_TESTS in the environment names the file, which gets a line of JSON when a test begins and one when it ends.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note the test that begins: a crash ends the process without a result."""
    _write({"test": nodeid, "outcome": "crashed"})


def pytest_runtest_logreport(report: Any) -> None:
    """Write the result of a test once its last phase is over, or once it can't be passed any more."""
    if report.outcome != "passed" or report.when == "call":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        result = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "text": text[-1500:]}
        _write({key: value for key, value in result.items() if value != ""})
    if report.failed and _device_is_lost():
        # All tests after this one would fail.
        os._exit(3)


def _device_is_lost() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def _write(result: dict[str, Any]) -> None:
    with open(os.environ["RECORD_OF_TESTS"], "a") as file:
        file.write(json.dumps(result) + "\n")
