"""Each step's own code, at tiny sizes on the CPU: Triton in its interpreter, the CPU library for the CUDA one."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.bench import measure
from fastvq.bench.data import Shape
from fastvq.bench.gpu import __main__ as command
from fastvq.bench.gpu import build, exactness, machine, prediction, report, suites, times, tuning
from fastvq.bench.gpu.run import DOCUMENT
from fastvq.bench.gpu.sizes import FULL, TINY
from fastvq.bench.gpu.step import Context
from fastvq.bench.gpu.steps import FUNCTIONS, STEPS

launch = pytest.importorskip("fastvq.kernels.launch", reason="Triton isn't installed")

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels aren't interpreted where a GPU is")


@pytest.fixture
def context(tmp_path):
    (tmp_path / "work").mkdir()
    return Context(
        torch.device("cpu"), TINY, tmp_path / "results.json", ROOT, tmp_path / "work", time.monotonic() + 1e6
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Shorten the turns, and trace the compiled peers without generating code."""
    monkeypatch.setattr(measure, "_TURN_SECONDS", 1e-5)
    monkeypatch.setattr(measure, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    times.compiled_argmin.cache_clear()
    yield
    times.compiled_argmin.cache_clear()


def no_errors(context):
    assert context.records
    assert [r for r in context.records if "error" in r or "errors" in r] == []
    assert json.loads(context.results.read_text()) == context.records
    return context.records


def test_every_step_has_a_function():
    assert len({step.name for step in STEPS}) == len(STEPS) == len(FUNCTIONS)
    assert all(step.weight > 0 for step in STEPS)
    assert all((ROOT / name).exists() for sizes in (FULL, TINY) for name in (*sizes.tests, *sizes.kernel_tests))


def test_machine(context):
    machine.describe(context)
    records = {r["what"]: r for r in no_errors(context)}
    assert records["versions"]["versions"]["torch"]
    assert records["copy"]["terabytes"] > 0
    assert records["product of float64 matrices"]["tflops"] > 0


def test_clocks_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho {', '.join(map(str, range(len(machine.QUERY.split(',')))))}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.clocks()["name"] == "0"
    assert machine.clocks()["driver_version"] == "1"
    program.write_text("#!/bin/sh\necho no driver; exit 9\n")
    with pytest.raises(RuntimeError, match="ended with 9: no driver"):
        machine.clocks()


def test_compile(context):
    build.compile_kernels(context)
    assert sum(r["calls"] for r in no_errors(context)) >= 12


def test_tasks_in_processes(context, monkeypatch):
    """As on a GPU: one that crashes is recorded, and what it takes with it."""
    monkeypatch.setattr(build, "MOST_WORKERS", 1)
    context.device = torch.device("cuda")
    tasks = {"right": functools.partial(dict, calls=1), "broken": functools.partial(int, "x")}
    found = dict(build.in_processes(tasks | {"crash": functools.partial(os._exit, 7)}, context))
    assert found["right"]["calls"] == 1
    assert found["broken"]["error"].startswith("ValueError")
    assert found["crash"]["error"].startswith("BrokenProcessPool")


def test_data_are_made_once_and_stay_as_they_are(context):
    shape = TINY.timed[0]
    before = [t.clone() for t in times.vectors(context, shape, "clustered")]
    times.step_times(context, shape, "clustered")
    times.ema_times(context, shape, "clustered")
    after = times.vectors(context, shape, "clustered")
    assert all(map(torch.equal, before, after))
    assert after[0] is times.vectors(context, shape, "clustered")[0]


@pytest.mark.parametrize("step", ["exact-triton", "exact-cuda", "full-triton", "full-cuda"])
def test_exactness(context, step):
    FUNCTIONS[step](context)
    assert all(r["wrong"] == 0 and r["rows"] > 0 for r in no_errors(context))


def test_a_wrong_index_is_counted_and_named(context, monkeypatch):
    def off_by_one(x, codebook, *, metric="l2"):
        found = fastvq.backends.reference.search(x, codebook, metric=metric)
        found[2] = (found[2] + 1) % len(codebook)
        return found

    monkeypatch.setattr(fastvq, "search", off_by_one)
    exactness.adversarial_cuda(context)
    exactness.full_cuda(context)
    searches = [r for r in context.records if r["what"].startswith("search")]
    assert len(searches) > 4
    for r in searches:
        assert r["wrong"] == r.get("searches", 1)
        assert "first" not in r or r["first"].endswith("codes (9, 3), at [2]")


def test_times(context):
    times.measure(context)
    records = no_errors(context)
    whats = ["search", "training step", "residual_search", "accumulate", "ema_update_", "search", "search"]
    assert [r["what"] for r in records] == [*whats, times.ITERATION]
    assert [r["data"] for r in records if r["what"] == "search"] == ["clustered", "copies", "gaussian"]
    for record in records:
        ran = [c for c in record["contestants"] if "seconds" in c]
        assert {c["wrong"] for c in ran if "wrong" in c} == {0}
        assert any(c["name"].startswith("fastvq") for c in ran)
        assert all(c["seconds"] >= c["least"] > 0 for c in ran)
        assert not [c for c in record["contestants"] if "error" in c]


def test_a_wrong_contestant_is_timed_and_its_mistakes_are_counted(context):
    x = torch.randn(9, 3)
    found = times.compare(
        context,
        TINY.timed[0],
        {"right": lambda: torch.clone, "wrong": lambda: torch.neg, "bare": lambda: lambda part: None, "left": "why"},
        [(x,), (x,)],
        lambda result: int((result != x).any(1).sum()),
    )
    wrong = {c["name"]: c.get("wrong") for c in found["contestants"]}
    assert wrong == {"right": 0, "wrong": 9, "bare": None, "left": None}
    assert [c["name"] for c in found["contestants"] if "seconds" in c] == ["right", "wrong", "bare"]


def test_a_contestant_that_fails_leaves_the_others(context):
    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory")

    x = torch.randn(9, 3)
    factories = {"broken": broken, "right": lambda: torch.clone}
    first, second = times.compare(context, TINY.timed[0], factories, [(x,)], lambda result: 0)["contestants"]
    assert (first["error"], "seconds" in first) == ("OutOfMemoryError: CUDA out of memory", False)
    assert second["seconds"] > 0


def test_inputs_are_rotated(monkeypatch):
    x = torch.arange(12.0).view(4, 3)
    seen = []
    inputs = [(part,) for part in times.rotated(x)]
    assert len(inputs) >= 2
    assert all(torch.equal(part.sort(0).values, x) for (part,) in inputs)
    times.seconds_of_each({"call": lambda part: seen.append(part.data_ptr())}, inputs, budget=0.0)
    assert seen[: len(inputs)] == [part.data_ptr() for (part,) in inputs]


def test_rows_in_turn_give_the_same_indices(monkeypatch):
    monkeypatch.setattr(times, "LARGEST_MATRIX", 4 * 5 * 7)
    x, codebook = torch.randn(23, 3), torch.randn(5, 3)
    taken = []

    def search(part):
        taken.append(len(part))
        return times.scores_argmin(part, codebook)

    assert torch.equal(times.in_turn(search, 5)(x), times.scores_argmin(x, codebook))
    assert taken == [7, 7, 7, 2]
    times.bare_product(Shape(23, 5, 3), codebook)(x)


def test_precision_is_restored():
    torch.set_float32_matmul_precision("high")
    assert times.at_precision("highest", torch.get_float32_matmul_precision)() == "highest"
    with pytest.raises(ZeroDivisionError):
        times.at_precision("medium", lambda: 1 / 0)()
    assert torch.get_float32_matmul_precision() == "high"


def test_autotune(context, monkeypatch):
    candidates = launch.candidates
    monkeypatch.setattr(launch, "candidates", lambda default: candidates(default)[:3])
    tuning.autotune(context)
    candidates, chosen = no_errors(context)
    names = [c["name"] for c in candidates["contestants"]]
    assert names[0] == tuning.TABLE
    assert names[1:] == ["paired False", "num_stages 2"]
    assert all(c["seconds"] > 0 and c["wrong"] == 0 for c in candidates["contestants"])
    assert chosen["wrong"] == 0


def test_a_configuration_is_in_the_table_for_its_searches_alone():
    device, shape = torch.device("cpu"), TINY.timed[0]
    before = {key: dict(table) for key, table in launch.SCANS.items()}
    config = list(tuning.configurations(device, shape).values())[-1]
    with tuning.in_the_table(device, shape, config):
        assert launch.scan(device, 16, 1) == config
        assert launch.scan(device, 16, 3) != config
    assert before == launch.SCANS


def test_cuda_paths(context):
    tuning.cuda_paths(context)
    records = no_errors(context)
    assert [[c["name"] for c in r["contestants"]] for r in records] == [list(tuning.PATHS)] * 2
    assert all(c["wrong"] == 0 for r in records for c in r["contestants"])
    assert "FASTVQ_CUDA_PATH" not in os.environ


def test_prediction(context):
    search = {"what": "search", "n": 65536, "k": 1024, "d": 64, "data": "clustered"}
    search["contestants"] = [
        {"name": "fastvq triton", "seconds": 2.0, "graph_seconds": 1.0},
        {"name": "fastvq native", "seconds": 3.0},
        {"name": "fastvq torch", "error": "none"},
    ]
    steps = [
        {"name": "machine", "results": [{"what": "device", "name": "NVIDIA H200"}]},
        {"name": "times", "results": [search]},
    ]
    document = context.results.parent / DOCUMENT
    document.write_text(json.dumps({"steps": steps}))
    prediction.compare(context)
    (record,) = no_errors(context)
    assert record["sheet"] == "h200"
    assert {name: s["measured"] for name, s in record["searches"].items()} == {
        "fastvq triton": 1.0,
        "fastvq native": 3.0,
    }
    assert all(0 < s["predicted"] <= s["serial"] for s in record["searches"].values())
    assert "no data sheet of 'Another GPU'" in prediction.beside("Another GPU", search)["not_run"]
    steps[1]["results"] = []
    document.write_text(json.dumps({"steps": steps}))
    with pytest.raises(LookupError, match="no search was timed"):
        prediction.compare(context)


class TestContext:
    def test_cases_without_time_are_named(self, context):
        now = [0.0]
        context.clock, context.end = lambda: now[0], 10.0
        for seconds in (5.0, 5.0, 5.0):

            def measured(seconds=seconds):
                now[0] += seconds
                return {"seconds": seconds}

            context.case(measured, what="case")
        assert context.records[:2] == [{"what": "case", "seconds": 5.0}] * 2
        assert context.records[2:] == [{"what": "case", "not_run": "no time left in this step"}]

    def test_a_case_that_fails_leaves_the_others(self, context):
        context.case(lambda: 1 / 0, what="broken")
        context.case(lambda: {"value": 1}, what="whole")
        assert context.records == [
            {"what": "broken", "error": "ZeroDivisionError: division by zero"},
            {"what": "whole", "value": 1},
        ]

    def test_a_lost_device_ends_the_step(self, context, monkeypatch):
        monkeypatch.setattr(Context, "device_is_lost", lambda self: True)
        with pytest.raises(RuntimeError, match="the device is lost after"):
            context.case(lambda: 1 / 0, what="broken")
        assert json.loads(context.results.read_text())[0]["error"].startswith("ZeroDivisionError")


SUITE = """
import os
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("outcome", ["passes", "fails", "crashes", "is skipped", "passes too"])
def test_that(outcome):
    if outcome == "is skipped":
        pytest.skip("the reason")
    if outcome == "crashes":
        os._exit(11)
    assert outcome != "fails"

def test_unmarked():
    raise SystemExit("it does not run")
"""


def test_a_crash_costs_one_test(context, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: needs one"]\n')
    (tmp_path / "test_suite.py").write_text(SUITE)
    context.root = tmp_path
    suites.run_tests(context, ["test_suite.py"], "gpu")
    outcomes = {r["test"].split("[")[1].rstrip("]"): r["outcome"] for r in no_errors(context)}
    assert outcomes == {
        "passes": "passed",
        "fails": "failed",
        "crashes": "crashed",
        "is skipped": "skipped",
        "passes too": "passed",
    }
    assert any("the reason" in r.get("text", "") for r in context.records)


COMPILER = """#!/bin/sh
# Stands for g++ and nvcc: makes the file after -o, and says its version.
case "$*" in *--version*) echo "fake compiler, release 1.0, V1.0.1"; exit 0;; *--dryrun*) exit 0;; esac
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && touch "$2"
  [ "$1" = -MF ] && touch "$2"
  shift
done
"""


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("g++", "nvcc"):
        (folder / name).write_text(COMPILER)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("CXX", str(folder / "g++"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_build(context, compilers):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "fastvq").rglob("*") if "__pycache__" not in str(path)}
    build.build(context)
    records = {r["what"]: r for r in no_errors(context)}
    assert set(records) == {"CPU library", "CUDA library"}
    package = context.work / build.SITE / "fastvq"
    assert (package / "_native.so").exists()
    assert (package / "_native_cuda.so").exists()
    assert (package / "kernels" / "search.py").exists()
    assert (package / "kernels" / "counts.json").exists()
    record = json.loads((package / "native_build.json").read_text())
    assert (record["built"], record["cuda"]["built"]) == (True, True)
    assert record["cuda"]["compiler"] == "nvcc 1.0.1"
    after = {path: path.stat().st_mtime_ns for path in (ROOT / "fastvq").rglob("*") if "__pycache__" not in str(path)}
    assert after == before


def test_a_library_that_does_not_build_leaves_the_other(context, compilers):
    (compilers / "nvcc").write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo release 1.0, V1 && exit\necho no luck\nexit 3\n"
    )
    with pytest.raises(RuntimeError, match="not built: CUDA library"):
        build.build(context)
    record = json.loads((context.work / build.SITE / "fastvq" / "native_build.json").read_text())
    assert record["built"]
    assert not record["cuda"]["built"]
    assert "no luck" in record["cuda"]["reason"]
    assert {r["what"]: "error" in r for r in context.records} == {"CPU library": False, "CUDA library": True}


def test_devices_and_their_code(context, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert build._architectures(context) is None
    context.device = torch.device("cuda")
    assert build._architectures(context) == ("sm_90a",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert build._architectures(context) is None


class TestCommand:
    def test_a_step_in_its_process(self, tmp_path):
        launch = command.launcher(tmp_path, tmp_path, rehearse=True)
        step = next(step for step in STEPS if step.name == "machine")
        ended = launch(step, 120.0, tmp_path / "results", lambda: None)
        assert ended.status == "done", ended.tail
        assert json.loads((tmp_path / "results").read_text())[0]["what"] == "versions"

    def test_steps_after_the_build_import_what_was_built(self, tmp_path):
        launch = command.launcher(tmp_path, tmp_path, rehearse=False)
        assert launch.environment("times")["PYTHONPATH"] == str(ROOT)
        (tmp_path / build.SITE / "fastvq").mkdir(parents=True)
        assert launch.environment("times")["PYTHONPATH"] == str(tmp_path / build.SITE)
        assert launch.environment("build")["PYTHONPATH"] == str(ROOT)
        assert "TRITON_INTERPRET" not in launch.environment("times").keys() - os.environ.keys()
        assert "--tiny" not in launch.command("times", 9.0, tmp_path)

    def test_all_steps_in_turn(self, tmp_path, monkeypatch, capsys):
        """The command itself: arguments, budget, page; each step is a process that writes one result."""

        def launcher(out, work, *, rehearse):
            assert rehearse
            code = "import json, sys; open(sys.argv[1], 'w').write(json.dumps([{'what': 'search', 'error': 'no'}]))"
            return command.InProcess(
                lambda name, seconds, results: command.python("-S", "-c", code, str(results)),
                lambda name: dict(os.environ),
                work,
                out / command.LOG,
            )

        monkeypatch.setattr(command, "launcher", launcher)
        monkeypatch.setattr(report, "page", lambda document: f"{len(document['steps'])} steps")
        arguments = [str(tmp_path / "out"), "--seconds=60", f"--work={tmp_path}/work", "--rehearse"]
        for _ in range(2):
            assert command.main(arguments) == 0
        assert f"{len(STEPS)} steps\nwritten:" in capsys.readouterr().out
        document = json.loads((tmp_path / "out" / DOCUMENT).read_text())
        assert [s["status"] for s in document["steps"]] == ["done"] * len(STEPS)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "gpu.1.json", "gpu.1.log", "gpu.1.md", "gpu.json", "gpu.log", "gpu.md",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["--seconds=5"], "--seconds: must be at least 60, got 5"), ([], "sees no GPU; --rehearse")],
    )
    def test_what_it_cannot_do(self, tmp_path, capsys, arguments, message):
        with pytest.raises(SystemExit):
            command.main([str(tmp_path / "out"), *arguments])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_tree_that_is_read_only(self, tmp_path, monkeypatch):
        assert command.default_work(tmp_path, tmp_path / "out") == tmp_path / "build" / "gpu"
        (tmp_path / "file").touch()
        assert command.default_work(tmp_path / "file", tmp_path / "out") == tmp_path / "out" / "work"

    def test_make_hands_on_its_settings(self):
        made = subprocess.run(
            ["make", "-n", "--no-print-directory", "gpu", "OUT=over there", "BUDGET=240", f"PYTHON={sys.executable}"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        assert made.splitlines()[-1] == f'"{sys.executable}" -m fastvq.bench.gpu "over there" --seconds 240'
