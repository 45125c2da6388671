"""One step, in this process: `python -m fastvq.bench.gpu.step NAME ...`, which run.py starts."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import faulthandler
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvq.files import write_whole

from .sizes import FULL, TINY, Sizes

MARGIN = 2.0
"""Seconds before the end of its time in which a step begins no further case."""
NO_TIME = "no time left in this step"


@dataclasses.dataclass
class Context:
    """Inputs of a step, and its results so far."""

    device: torch.device
    sizes: Sizes
    results: Path
    root: Path
    """The source tree."""
    work: Path
    """Folder of what is built and cached."""
    end: float
    """Time of `clock` at which the process is ended."""
    clock: Callable[[], float] = time.monotonic
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, **record: Any) -> None:
        """Append a result to the file of results."""
        self.replace([*self.records, record])

    def replace(self, records: list[dict[str, Any]]) -> None:
        """Replace all results, in the file too."""
        self.records = records
        write_whole(self.results, json.dumps(records) + "\n")

    def left(self) -> float:
        """Return the seconds in which a case may still begin."""
        return self.end - MARGIN - self.clock()

    def case(self, measure: Callable[[], dict[str, Any]], **names: Any) -> None:
        """Add the result of a case: what `measure` returns, its error, or that there was no time for it.

        Raises:
            RuntimeError: the device is lost, so that all further cases would fail too.
        """
        if self.left() <= 0:
            self.add(**names, not_run=NO_TIME)
            return
        try:
            found = measure()
        except Exception as error:
            self.add(**names, error=said(error))
            if self.device_is_lost():
                raise RuntimeError(f"the device is lost after {names}") from error
        else:
            self.add(**names, **found)

    def device_is_lost(self) -> bool:
        """Return whether the device answers no more: an illegal access ends all work of a process on it."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
            torch.zeros(1, device=self.device).item()
        except Exception:
            return True
        return False


def said(error: BaseException) -> str:
    """Return the type and the beginning of the message of an error."""
    return f"{type(error).__name__}: {error}"[:600]


def main(arguments: list[str] | None = None) -> int:
    """Run the step that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m fastvq.bench.gpu.step")
    parser.add_argument("name")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    _end_with_parent()
    # A step that hangs says where, in the last second before it is ended.
    faulthandler.dump_traceback_later(max(0.5, options.seconds - 1), exit=False)
    from .steps import FUNCTIONS

    sizes = TINY if options.tiny else FULL
    context = Context(torch.device(options.device), sizes, options.results, options.root, options.work, end)
    FUNCTIONS[options.name](context)
    faulthandler.cancel_dump_traceback_later()
    return 0


def _end_with_parent() -> None:
    """Let the kernel end this process when the run is killed; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
