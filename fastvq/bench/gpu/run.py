"""The run of all steps: each in a process of its own, within its time, and on disk before the next begins."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvq.files import write_whole

DOCUMENT, PAGE, LOG = "gpu.json", "gpu.md", "gpu.log"
LEAST_SECONDS = 3.0
"""A step is not begun with less."""
TAIL = 4000
"""Characters kept of the output of a step that failed."""


class Step(NamedTuple):
    """A step of the run.

    Its time is its share, by weight, of the time left to it and to the steps after it, so that what one leaves over
    goes to the others; `at_least` is for a step that is of no use unless it ends.
    """

    name: str
    what: str
    weight: float
    at_least: float = 0.0


class Ended(NamedTuple):
    """The end of a step's process."""

    status: str
    """"done", "failed" or "timed out"."""
    reason: str = ""
    tail: str = ""


Launch = Callable[[Step, float, Path, Callable[[], None]], Ended]
"""Runs a step: the step, its seconds, the file that it writes its results to, and what to call while it runs."""


def limit_of(steps: Sequence[Step], left: float) -> float:
    """Return the seconds of the first of the steps that are still to run, with `left` seconds for all of them."""
    share = left * steps[0].weight / sum(step.weight for step in steps)
    return min(left, max(share, steps[0].at_least))


def run_steps(
    steps: Sequence[Step],
    launch: Launch,
    folder: Path,
    *,
    budget: float,
    head: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
    saved: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Run the steps in order and return the document, which is in `folder` at any time, with all results so far.

    Every step has a record from the beginning: one that the run doesn't reach says so.

    Args:
        steps: the most important first.
        launch: runs one step.
        folder: of the document.
        budget: seconds for all steps.
        head: what the document begins with.
        clock: seconds since some moment.
        saved: called with the document after each time that it is written.
    """
    begin = clock()
    document = head | {"budget": budget, "steps": [_unreached(step) for step in steps]}

    def save() -> None:
        write_whole(folder / DOCUMENT, json.dumps(document, indent=1) + "\n")
        saved(document)

    save()
    for place, step in enumerate(steps):
        limit = limit_of(steps[place:], budget - (clock() - begin))
        record = document["steps"][place]
        if limit < LEAST_SECONDS:
            record["reason"] = f"no time left: {max(0.0, limit):.1f} s of {budget:g}"
            continue
        results = folder / f".{step.name}.json"
        results.unlink(missing_ok=True)

        def collect(record: dict[str, Any] = record, results: Path = results) -> None:
            found = _read(results)
            if found != record["results"]:
                record["results"] = found
                save()

        started = clock()
        record |= {"status": "cut off", "reason": "the run ended during this step", "limit": limit}
        save()
        try:
            ended = launch(step, limit, results, collect)
        except Exception:
            ended = Ended("failed", "could not be started", traceback.format_exc())
        except BaseException:
            collect()
            raise
        record |= {
            "status": ended.status,
            "reason": ended.reason,
            "tail": ended.tail[-TAIL:],
            "results": _read(results),
        }
        record["seconds"] = clock() - started
        results.unlink(missing_ok=True)
        save()
    document["seconds"] = clock() - begin
    save()
    return document


def _unreached(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "what": step.what,
        "status": "not run",
        "reason": "the run ended before this step",
        "results": [],
    }


def _read(path: Path) -> list[dict[str, Any]]:
    """Return what a step has written so far; steps replace the file as a whole."""
    try:
        return json.loads(path.read_text())
    except OSError:
        return []


class InProcess:
    """Launches steps as processes.

    Args:
        command: of a step, given its name, its seconds and the file of its results.
        environment: of the processes, given the name of the step.
        folder: current directory of the processes.
        log: file to which the output of all of them is appended.
    """

    def __init__(
        self,
        command: Callable[[str, float, Path], list[str]],
        environment: Callable[[str], dict[str, str]],
        folder: Path,
        log: Path,
    ) -> None:
        self.command, self.environment, self.folder, self.log = command, environment, folder, log

    def __call__(self, step: Step, limit: float, results: Path, collect: Callable[[], None]) -> Ended:
        end = time.monotonic() + limit
        with self.log.open("a+") as log:
            log.write(f"\n=== {step.name}, {limit:.0f} s\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                self.command(step.name, limit, results),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(step.name),
                cwd=self.folder,
                start_new_session=True,
            )
            try:
                code = self._wait(process, end, collect)
            finally:
                end_group(process)
            log.seek(begin)
            tail = log.read()[-TAIL:]
        if code is None:
            return Ended("timed out", f"ended after its {limit:.0f} s", tail)
        if code:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return Ended("failed", how, tail)
        return Ended("done")

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], end: float, collect: Callable[[], None]) -> int | None:
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(timeout=min(1.0, left))
            except subprocess.TimeoutExpired:
                collect()
        return process.poll()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def python(*arguments: str) -> list[str]:
    """Return the command of this interpreter; its output isn't held back."""
    return [sys.executable, "-u", *arguments]
