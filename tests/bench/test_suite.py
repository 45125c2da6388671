"""The benchmark suite: its measurements, its checks of results, and the report in docs/."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvq
from fastvq.bench import data, measure, peers, report, small, suite, targets, training
from fastvq.bench.data import Shape, from_file
from fastvq.bench.gpu import report as gpu_report
from fastvq.bench.peers import NATIVE, PRODUCT, Contestant
from fastvq.cli.main import main
from fastvq.errors import BenchError, WrongResultError

ROOT = Path(__file__).parents[2]
TINY = Shape(48, 24, 8)


def entrants(*names):
    return [c for c in peers.CONTESTANTS if c.name in names]


def always_zero(x, codebook):
    return lambda: torch.zeros(len(x), dtype=torch.int64)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    """Shorten the turns: the tests are about what is measured, not about how long it takes."""
    monkeypatch.setattr(measure, "_TURN_SECONDS", 1e-4)
    monkeypatch.setattr(measure, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "SQUARE", 256)


@pytest.fixture
def few_contestants(monkeypatch):
    few = entrants("fastvq torch", "addmm + argmin", PRODUCT)
    for module in (peers, suite, measure):
        monkeypatch.setattr(module, "CONTESTANTS", few)


@pytest.fixture
def document():
    return json.loads((ROOT / "docs" / report.DOCUMENT).read_text())


def bench(*arguments):
    return main(["bench", "--n=48", "--k=24", "--d=8", "--threads=1", *arguments])


class TestOneShape:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_prints_a_row_for_each_contestant_and_writes_json(self, few_contestants, capsys, tmp_path, dtype):
        path = tmp_path / "one.json"
        assert bench("--data=gaussian", f"--dtype={dtype}", f"--json={path}") == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"N=48 K=24 D=8 {dtype} gaussian, 1 threads")
        for name in ("fastvq torch", "addmm + argmin", PRODUCT):
            assert re.search(rf"\| {re.escape(name)} +\| +[\d.e+]+ (us|ms|s) +\|", printed)
        assert re.search(r"fastvq torch .*\| 0 of 48", printed)
        record = json.loads(path.read_text())["search"][0]
        assert [c["name"] for c in record["contestants"]] == ["fastvq torch", "addmm + argmin", PRODUCT]
        assert all(c["seconds"] > 0 and c["runs"] >= 3 for c in record["contestants"])

    def test_vectors_of_a_file(self, few_contestants, capsys, tmp_path):
        np.save(tmp_path / "mine.npy", np.random.default_rng(0).standard_normal((60, 8), np.float32))
        assert bench(f"--data={tmp_path}/mine.npy") == 0
        assert "0 of 48" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--n=0"], "--n: must be at least 1, got 0"),
            (["--k=-3"], "--k: must be at least 1, got -3"),
            (["--d=0"], "--d: must be at least 1, got 0"),
            (["--threads=0"], "--threads: must be at least 1, got 0"),
            (["--dtype=int8"], "--dtype: must be one of float32, float16, bfloat16, got 'int8'"),
            (
                ["--data=uniform"],
                "gaussian, clustered, copies, directed, latents, audio, audio-stage-3 or the path of an .npy file, got",
            ),
            (["--data=absent.npy"], "--data: absent.npy doesn't exist"),
            (["--data=latents"], "--data: latents have D=64 or 256, got D=8"),
            (["--data=audio"], "--data: vectors of the audio codec have D=64, got D=8"),
            (["--device=gpu9"], "--device: 'gpu9' cannot be used here"),
            (["--device=meta"], "--device: 'meta' cannot be used here"),
            (["--json=there.txt"], "--json: must end in .json, got there.txt"),
            (["--out=there"], "--out: has no effect without --suite or --model"),
            (["--model=a100", "--data=gaussian"], "--data: has no effect with --model"),
        ],
    )
    def test_errors_name_the_argument(self, few_contestants, capsys, arguments, message):
        assert bench(*arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments", [["--out=nowhere", "--render"], ["--suite", "--n=5"], ["--suite", "--render"]]
    )
    def test_a_suite_takes_no_shape(self, few_contestants, capsys, tmp_path, monkeypatch, arguments):
        monkeypatch.chdir(tmp_path)
        assert main(["bench", *arguments]) == 2
        assert re.search(r"--n: has no effect|--render: (has no effect|nowhere/bench)", capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("values", "given", "shape"),
        [
            (np.ones((60, 9), np.float32), [], (60, 60, 9)),
            (np.ones((4, 15, 3), np.float16), ["--k=7"], (60, 7, 3)),
            (np.ones((2, 2, 15, 3), order="F"), ["--n=50", "--k=16", "--d=3"], (50, 16, 3)),
        ],
    )
    def test_the_shape_is_that_of_the_file(self, few_contestants, capsys, tmp_path, values, given, shape):
        np.save(tmp_path / "mine.npy", values)
        assert main(["bench", "--data", str(tmp_path / "mine.npy"), "--json", str(tmp_path / "a.json"), *given]) == 0
        (record,) = json.loads((tmp_path / "a.json").read_text())["search"]
        assert (record["n"], record["k"], record["d"]) == shape

    def test_the_codes_are_at_most_1024_vectors_of_the_file(self, tmp_path):
        np.save(tmp_path / "mine.npy", np.arange(3000, dtype=np.float64).reshape(1500, 2))
        x, codebook = from_file(tmp_path / "mine.npy", None, None, None)
        assert (x.shape, codebook.shape) == ((1500, 2), (1024, 2))
        assert len(codebook.unique(dim=0)) == 1024
        assert {tuple(row) for row in codebook.tolist()} <= {tuple(row) for row in x.tolist()}

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (np.zeros((60, 9), np.float32), "--d: {} holds vectors of 9 dimensions, got 8"),
            (np.zeros((40, 8), np.float32), "--n: {} holds 40 vectors, got 48"),
            (np.zeros((60, 8), np.int64), "--data: {} must hold floats, got int64"),
            (np.zeros((60, 8), np.complex64), "--data: {} must hold floats, got complex64"),
            (np.array([{}], object), "--data: {} cannot be read as .npy: it holds Python objects, not numbers"),
            (np.zeros(60), "--data: {} must hold vectors, (N, D) or (..., D), got shape (60,)"),
            (np.zeros((0, 8)), "--data: {} must hold vectors, (N, D) or (..., D), got shape (0, 8)"),
            (
                np.full((60, 8), [[1.0]] * 5 + [[np.nan]] * 2 + [[1.0]] * 53),
                "2 of 60 vectors do not, the first at row 5",
            ),
            (np.full((60, 8), 1e300), "60 of 60 vectors do not"),
        ],
    )
    def test_files_that_do_not_fit(self, few_contestants, capsys, tmp_path, values, message):
        np.save(tmp_path / "mine.npy", values)
        assert bench(f"--data={tmp_path}/mine.npy") == 2
        assert message.format(tmp_path / "mine.npy") in capsys.readouterr().err

    def test_more_codes_than_vectors(self, few_contestants, capsys, tmp_path):
        np.save(tmp_path / "mine.npy", np.zeros((60, 8)))
        assert main(["bench", f"--data={tmp_path}/mine.npy", "--k=61"]) == 2
        assert "--k: the codes are vectors of " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.npy", b"", "it is empty"),
            ("a.npy", b"text", "it has another format"),
            ("a.npy", b"GIF89a", "it has another format"),
            ("a.npz", b"PK\x03\x04", "must be an .npy file"),
            ("a.safetensors", b"", "must be an .npy file"),
        ],
    )
    def test_files_of_other_kinds(self, few_contestants, capsys, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        assert bench(f"--data={tmp_path / name}") == 2
        error = capsys.readouterr().err
        assert error.startswith("fastvq: --data: ")
        assert message in error

    def test_a_wrong_index_of_fastvq_ends_the_run(self, monkeypatch, capsys):
        broken = Contestant("fastvq torch", always_zero, float32_only=False)
        monkeypatch.setattr(peers, "CONTESTANTS", [broken])
        assert bench() == 2
        assert re.search(r"fastvq torch is wrong in \d+ of 48", capsys.readouterr().err)


class TestMeasuring:
    def test_a_wrong_peer_is_timed_and_its_mistakes_are_counted(self):
        x, codebook = data.gaussian(TINY)
        records = measure.measure_search(TINY, x, codebook, budget=0.0, entrants=[Contestant("peer", always_zero)])
        expected = int((fastvq.backends.reference.search(x, codebook) != 0).sum())
        assert (records[0]["wrong"], records[0]["checked"]) == (expected, 48)
        assert records[0]["seconds"] > 0
        assert report.search_rows({"contestants": records})[0][-1] == f"{expected} of 48"

    @pytest.mark.parametrize(("name", "error"), [("peer", None), ("fastvq torch", RuntimeError)])
    def test_only_a_peer_may_fail(self, name, error):
        def fails(x, codebook):
            raise RuntimeError("no compiler\nof this kind")

        x, codebook = data.gaussian(TINY)
        with pytest.raises(error, match="no compiler") if error else nullcontext():
            records = measure.measure_search(TINY, x, codebook, budget=0.0, entrants=[Contestant(name, fails)])
            assert records == [{"name": "peer", "not_run": "fails: no compiler"}]

    def test_all_real_contestants_are_right_on_clustered_data(self):
        x, codebook = data.clustered(TINY)
        for record in measure.measure_search(TINY, x, codebook, budget=0.0):
            if "not_run" in record:
                compiler = "|fails: CppCompileError" * (record["name"] == "torch.compile" and " " in sys.prefix)
                assert re.search("isn't installed|was built|lacks|needs at least" + compiler, record["not_run"])
            elif record["name"] != PRODUCT:
                assert record["wrong"] == 0, record

    def test_calls_take_turns(self):
        order = []
        calls = {"long": lambda: (order.append("long"), time.sleep(0.02)), "short": lambda: order.append("short")}
        times = measure.interleave(calls, budget=0.0)
        assert {name: len(t) for name, t in times.items()} == {"long": 3, "short": 3}
        turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
        assert turns == ["long", "short"] * 4
        assert order.count("long") == 2 + 3
        assert order.count("short") > 100
        assert min(times["long"]) >= 0.02
        assert max(times["short"]) < 1e-3
        more = measure.interleave(calls, budget=1e-9, slow=8.0)
        assert {name: len(t) for name, t in more.items()} == {"long": 3, "short": 9}

    def test_rows_to_check_are_all_or_spread_over_the_batch(self, monkeypatch):
        x, codebook = torch.randn(1000, 8), torch.randn(16, 8)
        assert torch.equal(measure.checked_rows(x, codebook), torch.arange(1000))
        monkeypatch.setattr(measure, "CHECKED_PAIRS", 160)
        rows = measure.checked_rows(x, codebook)
        assert rows.tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
        assert measure.checked_rows(x[:3], codebook).tolist() == [0, 1, 2]

    def test_a_mistake_in_any_row_is_found(self):
        x, codebook = data.clustered(TINY)

        def wrong_in_one(x, codebook):
            found = fastvq.search(x, codebook)
            found[37] = (found[37] + 1) % len(codebook)
            return lambda: found

        (record,) = measure.measure_search(TINY, x, codebook, budget=0.0, entrants=[Contestant("peer", wrong_in_one)])
        assert (record["wrong"], record["checked"]) == (1, 48)

    @pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux alone")
    def test_a_measurement_in_a_child(self, capfd):
        assert measure.in_a_child(lambda: 12345678901) == 12345678901
        with pytest.raises(RuntimeError, match="ended with 1"):
            measure.in_a_child(lambda: 1 // 0)
        assert "ZeroDivisionError" in capfd.readouterr().err

    def test_reasons_for_not_running(self):
        cpu, absent = torch.device("cpu"), peers._package("no_such_module")
        whole = Contestant("w", always_zero, whole_matrix=True)
        assert whole.why_not(Shape(1 << 16, 1 << 16, 8), torch.float32, cpu) == "its N x K matrix would take 17.2 GB"
        assert whole.why_not(TINY, torch.float32, cpu) == ""
        assert whole.why_not(TINY, torch.bfloat16, cpu) == "doesn't take bfloat16"
        missing = Contestant("m", always_zero, absent)
        assert missing.why_not(TINY, torch.float32, cpu) == "no_such_module isn't installed"
        assert entrants("faiss-cpu")[0].why_not(TINY, torch.float32, torch.device("cuda")) == "runs on cpu, not on cuda"
        long = Contestant("l", always_zero, least_dim=32)
        assert long.why_not(Shape(1, 2, 31), torch.float32, cpu) == "needs at least 32 dimensions"
        assert long.why_not(Shape(1, 2, 32), torch.float32, cpu) == ""

    def test_an_iteration_of_super_kmeans_finds_nearly_all_nearest_codes(self):
        """From codes of which a tenth and more are not the nearest any more."""
        entrant = entrants("faiss SuperKMeans")[0]
        shape = Shape(2000, 600, 64)
        if reason := entrant.why_not(shape, torch.float32, torch.device("cpu")):
            pytest.skip(reason)
        x, codebook = data.gaussian(shape)
        call = entrant.prepare(x, codebook)
        expected = fastvq.search(x, codebook)
        for _ in range(2):
            assert (call() == expected).float().mean() > 0.99

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
    def test_memory_of_an_allocation(self):
        megabyte = 1 << 20
        assert (
            64 * megabyte <= measure.extra_bytes(lambda: torch.ones(64 * megabyte, dtype=torch.uint8)) < 72 * megabyte
        )
        assert measure.extra_bytes(lambda: None) < 8 * megabyte

    def test_clustered_data_belong_to_their_codes_and_gaussian_data_to_none(self):
        shape = Shape(256, 64, 32)
        spread = {}
        for kind in ("gaussian", "clustered"):
            x, codebook = data.DATA[kind](shape)
            assert (x.shape, codebook.shape) == ((256, 32), (64, 32))
            two = torch.cdist(x, codebook).sort(1).values[:, :2]
            spread[kind] = (two[:, 0] / two[:, 1]).mean().item()
        assert spread["clustered"] < 0.25
        assert spread["gaussian"] > 0.75

    def test_directed_data_lie_near_few_directions(self):
        x, codebook = data.directed(Shape(3000, 2000, 40))
        for vectors in (x, codebook):
            squares = torch.linalg.svdvals(vectors).square()
            shares = squares.cumsum(0) / squares.sum()
            assert [shares[d - 1].item() for d in (4, 8, 16)] == pytest.approx([0.87, 0.97, 0.995], abs=0.01)
        with pytest.raises(BenchError, match="D above 16, got D=16"):
            data.directed(Shape(10, 10, 16))

    def test_the_suite_searches_latents_where_there_are_some(self):
        for shape in data.SHAPES:
            kinds = suite.kinds_of(shape)
            assert kinds[:2] == ["gaussian", "clustered"]
            assert ("latents" in kinds) == (shape.n > 64 and shape.d in (64, 256))
        assert "directed" in suite.kinds_of(Shape(16384, 8192, 256))
        assert suite.kinds_of(Shape(16384, 1024, 64))[2:] == ["latents", "audio", "audio-stage-3"]

    def test_latents_are_trained_once(self, monkeypatch, tmp_path):
        calls = []

        def train(dim, steps):
            calls.append(steps)
            return torch.randn(5000, dim)

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(data, "_train_latents", train)
        first, second = (data.latents(Shape(20, 10, 64)) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert len(calls) == 1
        assert [path.suffix for path in (tmp_path / "fastvq").iterdir()] == [".pt"]
        assert data.latents(Shape(20, 1000, 64))[1].shape == (1000, 64)
        assert data.latents(Shape(20, 1000, 256))[0].shape == (20, 256)

    def test_latents_come_from_a_trained_encoder(self):
        vectors = data._train_latents(64, 2)
        assert vectors.shape[1] == 64
        assert len(vectors) > 49_000
        assert vectors.isfinite().all()
        assert vectors.std(0).min() > 0

    def test_later_stages_get_what_earlier_ones_leave(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(data, "_AUDIO_STEPS", 2)
        first, third = (data.audio(Shape(30_000, 600, 64), stage=stage)[0] for stage in (1, 3))
        assert first.shape == third.shape == (30_000, 64)
        assert third.isfinite().all()
        assert 0 < third.square().sum() < first.square().sum()

    def test_step_beside_the_peer(self):
        record = training.measure_step(Shape(256, 32, 8), budget=0.0)
        assert record["agreement"] >= 0.999
        assert record["ratio"] == record["seconds"][training.PEER] / record["seconds"]["fastvq"]

    def test_layers_that_disagree_are_not_compared(self, monkeypatch):
        monkeypatch.setattr(training, "agreement", lambda made, x: 0.5)
        with pytest.raises(RuntimeError, match="agree on 50"):
            training.measure_step(Shape(64, 16, 8), budget=0.0)


class TestSuite:
    def test_a_tiny_suite_from_measurement_to_page(self, few_contestants, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(suite, "SHAPES", [TINY])
        monkeypatch.setattr(suite, "OTHER_SHAPES", [Shape(40, 10, 3)])
        monkeypatch.setattr(suite, "FORCED", {"float32": [TINY]})
        monkeypatch.setattr(suite, "STEPS", [TINY])
        monkeypatch.setattr(suite, "RESIDUAL_STEP", TINY)
        monkeypatch.setattr(suite, "STACKS", [small.Stack(8, 4, 2)])
        monkeypatch.setattr(suite, "ROWS", (3,))
        monkeypatch.setattr(suite, "SCALING", {axis: [TINY] for axis in "NKD"})
        monkeypatch.setattr(suite, "thread_counts", lambda: [1])
        readme = tmp_path / "README.md"
        readme.write_text("A step takes <!-- bench:step-48-24-8-0 -->?<!-- /bench --> less.")
        assert main(["bench", "--suite", f"--out={tmp_path}/docs", f"--readme={readme}"]) == 0
        document = json.loads((tmp_path / "docs" / report.DOCUMENT).read_text())
        assert {r["data"] for r in document["search"]} == {"gaussian", "clustered"}
        assert document["machine"]["fastvq"] == fastvq.__version__
        assert (tmp_path / "docs" / report.PAGE).read_text() == report.page(document)
        assert re.search(r"0 -->\d+ times<!-- /bench --> less\.$", readme.read_text())
        images = [path.name for path in sorted((tmp_path / "docs" / "images").iterdir())]
        assert images == ["bench_roofline.png", "bench_scaling.png", "bench_search.png"]
        memory = [r for r in document["memory"] if r["what"] == "search"]
        assert [r["name"] for r in memory] == ["fastvq torch", "addmm + argmin", PRODUCT]
        assert all(r["bytes"] >= 0 for r in document["memory"])
        assert {(r["n"], r["k"], r["d"]) for r in document["memory"]} == {tuple(TINY)}
        (forced,) = document["forced"]
        assert forced["gflops"] == 2e-9 * 48 * 24 * 8 / forced["seconds"]
        assert min(forced[rate] for rate in ("peak", "float32_peak", "product")) > 0
        again = {path: path.read_bytes() for path in (tmp_path / "docs").glob("*.*")}
        assert main(["bench", "--render", f"--out={tmp_path}/docs"]) == 0
        assert again == {path: path.read_bytes() for path in (tmp_path / "docs").glob("*.*")}
        assert "search N=48 K=24 D=8 clustered" in capsys.readouterr().out

    def test_a_figure_that_does_not_exist_is_an_error(self, document):
        with pytest.raises(KeyError, match="no-such"):
            report.with_figures("<!-- bench:no-such -->1<!-- /bench -->", document)

    def test_docs_show_what_was_measured(self, document):
        assert (ROOT / "docs" / report.PAGE).read_text() == report.page(document)
        for name in ("README.md", "docs/decisions.md"):
            text = (ROOT / name).read_text()
            assert report.with_figures(text, document) == text
        assert "<!-- bench:" in (ROOT / "README.md").read_text()

    def test_a_document_outlives_a_picture_that_fails(self, document, monkeypatch, tmp_path):
        monkeypatch.setattr(report, "plot_search", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report.write_report(document, tmp_path)
        assert json.loads((tmp_path / report.DOCUMENT).read_text()) == document

    def test_every_kind_of_data_has_a_color(self, document, tmp_path):
        kinds = {kind for shape in data.SHAPES for kind in suite.kinds_of(shape)}
        (record, *_) = document["search"]
        path = report.plot_search(
            {**document, "search": [record | {"data": kind} for kind in kinds]}, tmp_path / "a.png"
        )
        assert path.exists()

    def test_a_part_that_was_measured_later_says_so(self, document):
        later = document | {"again": {"small": {"date": "2030-01-01", "commit": "abc"}}}
        assert report.page(later).count("Measured again on 2030-01-01, at commit abc.") == 1

    def test_docs_show_what_was_measured_on_a_gpu(self):
        source, target = (ROOT / "docs" / name for name in (gpu_report.SOURCE, gpu_report.TARGET))
        assert source.exists() == target.exists()
        if source.exists():
            assert target.read_text() == gpu_report.page(json.loads(source.read_text()))


class TestTargets:
    @staticmethod
    def search(seconds, kind="clustered", shape=(16384, 512, 64)):
        n, k, d = shape
        contestants = [{"name": name, "seconds": s} for name, s in seconds.items()]
        return {"n": n, "k": k, "d": d, "data": kind, "contestants": contestants}

    def outcomes(self, **changes):
        record = self.search({NATIVE: 1.0, "faiss-cpu": 2.6, "scikit-learn": 9.0, PRODUCT: 2.1})
        rates = [{"tier": "float32", "d": 64, "gflops": 90.0}, {"tier": "int16", "d": 128, "gflops": 170.0}]
        step = {"n": 1, "k": 2, "d": 3, "stages": 0, "ratio": 25.0}
        document = {
            "machine": {"peers": ["faiss-cpu", "scikit-learn"]},
            "ceilings": {"float32": 100.0, "bfloat16": 200.0, "int16": 200.0},
            "search": [record],
            "other": [],
            "forced": rates,
            "steps": [step, step | {"stages": 8}],
            "scaling": {"N": [{"n": 1, "k": 100, "d": 50, "gflops": {NATIVE: 1.0, "addmm": 2.0, "absent": None}}]},
        }
        return targets.outcomes(document | changes)

    def test_all_met(self):
        rows = self.outcomes()
        gaussian = [o for o in rows if o.met is None]
        assert [o.measured for o in gaussian] == ["no peer ran"]
        assert all(o.met for o in rows if o not in gaussian)
        assert rows[0].measured == "2.60 x"

    @pytest.mark.parametrize(
        ("changes", "on"),
        [
            ({"search": [search({NATIVE: 1.0, "faiss-cpu": 2.4, PRODUCT: 2.1})]}, "clustered data, geometric mean"),
            ({"search": [search({NATIVE: 1.0, "faiss-cpu": 1.9}, "gaussian")]}, "gaussian data, geometric mean"),
            ({"other": [search({NATIVE: 1.0, "faiss-cpu": 1.1})]}, "any shape and data"),
            ({"search": [search({NATIVE: 1.0, "faiss-cpu": 3.0, PRODUCT: 1.9})]}, "clustered, D >= 64"),
            ({"search": [search({NATIVE: 1.0, PRODUCT: 2.9}, "latents")]}, "N=16384 K=512 D=64 latents"),
            (
                {"search": [search({NATIVE: 1.0, PRODUCT: 9.9}, "latents", (16384, 8192, 64))]},
                "N=16384 K=8192 D=64 latents",
            ),
            ({"forced": [{"tier": "float32", "d": 64, "gflops": 80.0}]}, "float32 tier alone"),
            ({"forced": [{"tier": "float32", "d": 64, "gflops": 95.0, "peak": 110.0}]}, "float32 tier alone"),
            ({"forced": [{"tier": "int16", "d": 128, "gflops": 150.0}]}, "int16 tier alone"),
            ({"steps": [{"n": 1, "k": 2, "d": 3, "stages": 0, "ratio": 9.0}]}, "each"),
            ({"steps": [{"n": 1, "k": 2, "d": 3, "stages": 0, "ratio": 19.0}]}, "geometric mean"),
        ],
    )
    def test_each_can_be_missed(self, changes, on):
        missed = [o.on for o in self.outcomes(**changes) if o.met is False]
        assert [name for name in missed if name.startswith(on)]

    def test_a_peak_in_turns_with_a_tier_counts_for_it(self):
        worst = {"tier": "int16", "d": 256, "gflops": 70.0, "peak": 100.0, "float32_peak": 50.0, "product": 30.0}
        rows = self.outcomes(forced=[worst, {"tier": "int16", "d": 128, "gflops": 90.0, "peak": 100.0}])
        row = next(o for o in rows if o.on.startswith("int16"))
        assert (row.measured, row.met) == ("70% of 100 GFLOP/s", False)
        assert row.why == "D=256; in turns with it a torch.mm of square matrices reached 60% of the float32 peak"

    def test_a_target_that_is_missed_is_explained_by_what_was_measured(self):
        slow = self.search({NATIVE: 1.0, "faiss-cpu": 1.1, PRODUCT: 1.5})
        for contestant, rate in zip(slow["contestants"], (120.0, 1.0, 70.0), strict=True):
            contestant["gflops"] = rate
        step = {"n": 1, "k": 2, "d": 3, "stages": 8, "ratio": 9.0, "search_seconds": 3.0, "seconds": {"fastvq": 4.0}}
        why = {o.on: o.why for o in self.outcomes(search=[slow], steps=[step | {"stages": 0, "ratio": 30.0}, step])}
        assert "at most 2.00 times as fast" in why["clustered, D >= 64, N >= 4096, worst"]
        assert "60% of its peak, torch.mm 70% of its own" in why["clustered, D >= 64, N >= 4096, worst"]
        assert "fastvq native 10 us, addmm 5 us" in why["any shape and data, other shapes included"]
        assert "the search alone took 75%" in why["8 stages, N=1 K=2 D=3"]

    def test_only_missed_targets_are_explained_on_the_page(self, document):
        found = targets.outcomes(document)
        missed = [o for o in found if o.met is False and o.why]
        shown = re.findall(r"^- (.*), against (.*?): ", report.page(document), re.M)
        assert shown == [(o.on, o.against) for o in missed]

    def test_a_machine_without_the_instructions_meets_nothing(self):
        rows = self.outcomes(ceilings={"float32": 100.0, "bfloat16": None, "int16": None})
        row = next(o for o in rows if o.on.startswith("int16"))
        assert (row.met, row.verdict, row.measured) == (None, "not applicable", "no such instructions")


class TestSmallBatches:
    STACK = small.Stack(32, 6, 3)

    def records(self):
        return small.measure_small(self.STACK, 5, budget=0.0)

    def test_each_way_to_encode_and_decode_is_checked_and_timed(self, document):
        encode, decode = self.records()
        assert (encode["what"], decode["what"], encode["n"], encode["stages"]) == ("encode", "decode", 5, 3)
        for record, least in ((encode, 4), (decode, 2)):
            timed = [c for c in record["contestants"] if "seconds" in c]
            assert len(timed) >= least
            assert all(c["wrong"] == 0 for c in timed if c["name"].startswith("fastvq"))
        document["small"] = [encode, decode]
        page = report.page(document)
        assert "| encode, K=32 D=6 Q=3" in page
        assert re.search(r"\| fastvq PackedCodebook +\| [\d.]+ (us|ms)", page)
        found = [o for o in targets.outcomes(document) if "PackedCodebook" in o.on]
        assert [o.wanted for o in found] == ["1.0 x", "3.0 x"]

    def test_absent_codecs_are_named(self, monkeypatch, document):
        monkeypatch.setattr(small, "_absent", lambda: "transformers isn't installed")
        document["small"] = records = self.records()
        for record in records:
            reasons = [c["not_run"] for c in record["contestants"] if "transformers" in c["name"]]
            assert reasons == ["transformers isn't installed"] * 3
        assert "Not run: Mimi of transformers: transformers isn't installed; EnCodec" in report.page(document)

    @pytest.mark.parametrize("name", ["residual_search", "PackedCodebook"])
    def test_a_wrong_index_ends_the_run(self, monkeypatch, name):
        real = fastvq.residual_search
        monkeypatch.setattr(
            fastvq,
            "residual_search",
            lambda x, codes: real(x, codes) + (isinstance(codes, fastvq.PackedCodebook) == (name == "PackedCodebook")),
        )
        with pytest.raises(WrongResultError, match=f"fastvq {name} is wrong in 5 of 5 rows: N=5 K=32 D=6 Q=3 encode"):
            self.records()
