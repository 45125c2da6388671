"""The flow of a run on a GPU: time, hangs, crashes and cuts; steps, clock and device are fakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fastvq.bench.gpu.run import DOCUMENT, Ended, InProcess, Step, python, run_steps

HEAD = {"command": "python -m fastvq.bench.gpu out", "date": "2026-01-01", "fastvq": "0", "rehearsal": True}
THREE = [Step("one", "first", 1), Step("two", "second", 2), Step("three", "third", 1)]


class FakeMachine:
    """A clock, and a launch that lets each step take its seconds and write its results."""

    def __init__(self, **taken):
        self.now, self.taken, self.limits = 100.0, taken, {}

    def clock(self):
        return self.now

    def launch(self, step, limit, results, collect):
        self.limits[step.name] = limit
        taken = self.taken[step.name]
        if isinstance(taken, BaseException):
            raise taken
        results.write_text(json.dumps([{"what": step.name}]))
        collect()
        if taken > limit:
            self.now += limit
            return Ended("timed out", "ended", "the last line")
        self.now += taken
        return Ended("done")


def written(folder):
    return json.loads((folder / DOCUMENT).read_text())


def test_each_step_gets_its_share_of_what_is_left(tmp_path):
    machine = FakeMachine(one=5.0, two=10.0, three=3.0)
    document = run_steps(THREE, machine.launch, tmp_path, budget=100, head=HEAD, clock=machine.clock)
    assert machine.limits == {"one": 25.0, "two": pytest.approx(95 * 2 / 3), "three": pytest.approx(85.0)}
    assert [(s["status"], s["seconds"]) for s in document["steps"]] == [("done", 5.0), ("done", 10.0), ("done", 3.0)]
    assert document["seconds"] == 18.0
    assert written(tmp_path) == document
    assert {key: document[key] for key in HEAD} == HEAD


def test_a_step_that_is_of_no_use_unless_it_ends_gets_more(tmp_path):
    machine = FakeMachine(one=5.0, build=40.0, two=1.0)
    steps = [Step("one", "", 1), Step("build", "", 1, at_least=50.0), Step("two", "", 8)]
    run_steps(steps, machine.launch, tmp_path, budget=100, head=HEAD, clock=machine.clock)
    assert machine.limits == {"one": 10.0, "build": 50.0, "two": 55.0}


def test_a_small_budget_scales_all_and_names_what_it_leaves_out(tmp_path):
    machine = FakeMachine(one=99.0, two=99.0, three=99.0)
    document = run_steps(THREE, machine.launch, tmp_path, budget=10, head=HEAD, clock=machine.clock)
    assert [s["status"] for s in document["steps"]] == ["not run", "timed out", "timed out"]
    assert document["steps"][0]["reason"] == "no time left: 2.5 s of 10"
    assert sum(machine.limits.values()) == pytest.approx(10)


def test_a_step_that_cannot_start_does_not_stop_the_rest(tmp_path):
    machine = FakeMachine(one=OSError("no such program"), two=1.0, three=99.0)
    first, second, third = run_steps(THREE, machine.launch, tmp_path, budget=50, head=HEAD, clock=machine.clock)[
        "steps"
    ]
    assert (first["status"], first["results"]) == ("failed", [])
    assert "no such program" in first["tail"]
    assert (second["status"], second["results"]) == ("done", [{"what": "two"}])
    assert (third["status"], third["tail"], third["results"]) == ("timed out", "the last line", [{"what": "three"}])


def test_results_are_on_disk_while_a_step_runs_and_after_a_cut(tmp_path):
    seen = []

    def launch(step, limit, results, collect):
        seen.append([(s["name"], s["status"], s["results"]) for s in written(tmp_path)["steps"]])
        if step.name == "two":
            results.write_text(json.dumps([{"what": "half"}]))
            raise KeyboardInterrupt
        results.write_text(json.dumps([{"what": "whole"}]))
        return Ended("done")

    with pytest.raises(KeyboardInterrupt):
        run_steps(THREE, launch, tmp_path, budget=50, head=HEAD)
    assert seen[0] == [("one", "cut off", []), ("two", "not run", []), ("three", "not run", [])]
    assert seen[1][0] == ("one", "done", [{"what": "whole"}])
    last = written(tmp_path)["steps"]
    assert (last[1]["status"], last[1]["results"]) == ("cut off", [{"what": "half"}])
    assert (last[2]["status"], last[2]["reason"]) == ("not run", "the run ended before this step")


class TestProcesses:
    @pytest.fixture
    def launch(self, tmp_path):
        def of(code):
            return InProcess(
                lambda name, seconds, results: python("-c", code, str(results)),
                lambda name: dict(os.environ),
                tmp_path,
                tmp_path / "log",
            )

        return of

    def ended(self, launch, tmp_path, limit=20.0):
        return launch(THREE[0], limit, tmp_path / "results", lambda: None)

    def test_a_step_that_ends(self, launch, tmp_path):
        ended = self.ended(launch("import sys; open(sys.argv[1], 'w').write('[1]'); print('said')"), tmp_path)
        assert ended == Ended("done")
        assert (tmp_path / "results").read_text() == "[1]"
        assert "=== one, 20 s\nsaid" in (tmp_path / "log").read_text()

    def test_a_step_that_crashes(self, launch, tmp_path):
        ended = self.ended(launch("import os; print('before', flush=True); os.kill(os.getpid(), 11)"), tmp_path)
        assert (ended.status, ended.reason, ended.tail.strip()) == ("failed", "ended by SIGSEGV", "before")
        ended = self.ended(launch("raise SystemExit('broken')"), tmp_path)
        assert (ended.status, ended.reason, ended.tail.strip()) == ("failed", "exit status 1", "broken")

    def test_a_step_that_hangs_is_ended_with_all_its_processes(self, launch, tmp_path):
        code = (
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)"
        )
        begin = time.monotonic()
        ended = self.ended(launch(code), tmp_path, limit=1.5)
        assert (ended.status, ended.reason) == ("timed out", "ended after its 2 s")
        assert time.monotonic() - begin < 10
        child = int(ended.tail.split()[0])
        end = time.monotonic() + 10
        while alive(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(child)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


CUT = """
import json, pathlib, sys
from fastvq.bench.gpu import run
step = run.Step("long", "", 1)
code = "import os, sys, time; open(sys.argv[1], 'w').write(f'[{os.getpid()}]'); time.sleep(60)"
out = pathlib.Path(sys.argv[1])
command = lambda name, seconds, results: run.python("-c", code, str(results))
launch = run.InProcess(command, lambda name: {}, out, out / "log")
run.run_steps([step], launch, out, budget=60, head={})
"""


def test_a_run_that_is_killed_keeps_what_its_step_had_written(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CUT, str(tmp_path)])
    try:
        for _ in range(300):
            time.sleep(0.1)
            if (tmp_path / DOCUMENT).exists() and written(tmp_path)["steps"][0]["results"]:
                break
        process.kill()
        process.wait()
        step = written(tmp_path)["steps"][0]
        assert step["status"] == "cut off"
        os.kill(*step["results"], signal.SIGKILL)
    finally:
        process.kill()
