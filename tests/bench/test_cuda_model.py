"""Predictions for the CUDA kernels: the way that serves a shape, its terms by hand, and errors."""

from __future__ import annotations

import importlib.resources
import json

import pytest

from fastvq import errors
from fastvq.bench import cuda_model, model
from fastvq.bench.data import Shape
from fastvq.cli.main import main

LIMITS = {"few_rows": 64, "few_at_once": 8, "cores_dim": 4}


def scan(kernel, products, step, rows, group, alu, half_rate=1.0, float32=1.0, shared=4.0, target="sm_90", **more):
    return {
        "kernel": kernel, "target": target, "products": products, "step": step, "rows": rows, "group": group,
        "alu": alu, "half_rate": half_rate, "float32": float32, "shared": shared, **more,
    }  # fmt: skip


STAY, STREAM, WHOLE = ({"where": where, "across": 1} for where in ("shared memory", "streamed", "registers"))
TWO = {"across": 2}
RECORDS = [
    scan("scan_cores<4>", 0, 4, 512, 32, 5.0, float32=4.0),
    scan("scan_cores<8>", 0, 8, 512, 32, 9.0, float32=8.0),
    scan("scan_cores<16>", 0, 16, 256, 32, 17.0, float32=16.0),
    scan("scan_cores<8>", 0, 8, 512, 32, 9.0, float32=8.0, target="sm_80"),
    scan("scan_matrix<1, 4, 16, 0, 1>", 1, 16, 256, 16, 2.5, **WHOLE),
    scan("scan_matrix<1, 4, 32, 0, 1>", 1, 32, 256, 16, 3.0, **WHOLE),
    scan("scan_matrix<1, 4, 32, 1, 2>", 1, 32, 128, 16, 3.5, **STAY | TWO),
    scan("scan_matrix<2, 1, 32, 1, 1>", 3, 32, 64, 16, 6.0, float32=2.0, shared=14.0, **STAY),
    scan("scan_matrix<1, 4, 32, 2, 2>", 1, 32, 128, 16, 3.5, shared=12.0, **STREAM | TWO),
    scan("scan_matrix<2, 1, 32, 2, 1>", 3, 32, 64, 16, 6.5, float32=2.0, shared=20.0, **STREAM),
    scan("scan_matrix<2, 2, 16, 0, 1>", 3, 16, 128, 16, 5.0, float32=2.0, **WHOLE),
]
COUNTS = {"compiler": "nvcc 13", "limits": LIMITS, "records": RECORDS}
H100 = model.DEVICES["h100"]


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.setattr(model, "load_cuda_counts", lambda: COUNTS)


class TestServing:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((1, 8192, 4), ["few"]),
            ((64, 8192, 700), ["few"]),
            ((65, 8192, 4), ["cores", "matrix"]),
            ((65, 8192, 5), ["matrix", "cores"]),
            ((65, 8192, 16), ["matrix", "cores"]),
            ((65, 8192, 17), ["matrix"]),
            ((65536, 8, 4096), ["matrix"]),
            ((65536, 8, 20000), ["define"]),
        ],
    )
    def test_a_shape(self, shape, expected):
        assert cuda_model.ways(LIMITS, H100, Shape(*shape)) == expected

    @pytest.mark.parametrize(
        ("dim", "products", "expected", "columns"),
        [(1, 0, 0, 4), (4, 0, 0, 4), (5, 0, 1, 8), (16, 0, 2, 16), (8, 1, 4, 16), (17, 1, 5, 32), (33, 1, 6, 64),
         (65, 1, 6, 128), (130, 1, 6, 192), (768, 1, 6, 768), (769, 1, 8, 832), (8, 3, 10, 16), (32, 3, 7, 32),
         (130, 3, 7, 192), (768, 3, 7, 768), (1000, 3, 9, 1024)],
    )  # fmt: skip
    def test_selected_scan(self, dim, products, expected, columns):
        found = cuda_model.scan_for(COUNTS, H100, dim, products)
        assert found is RECORDS[expected]
        assert cuda_model.packed_columns(found, dim) == columns

    def test_shipped_limits_are_those_of_the_source(self):
        """tests/cuda/test_build.py compares the rest if nvcc is installed."""
        assert cuda_model.load_cuda_counts()["limits"] == LIMITS


class TestTerms:
    def test_a_scan_on_cores_by_hand(self):
        terms = cuda_model.scan_terms(H100, RECORDS[1], Shape(65536, 1024, 7), 65536)
        lanes = 132 * 128 * 1.755e9
        assert terms.matrix == 0
        assert terms.epilogue == pytest.approx(65536 * 1024 * 9.0 / lanes)
        assert terms.memory == pytest.approx((65536 * (28 + 12) + 1024 * 36) / 3.35e12)
        assert terms.cache == pytest.approx(128 * 1024 * 36 / (5120 * 1.755e9))
        assert terms.shared == pytest.approx(65536 * 1024 * 4.0 / lanes)
        assert terms.binding == "epilogue"

    def test_multiply_adds_take_an_a100_twice_as_long(self):
        a100 = model.DEVICES["a100"]
        terms = cuda_model.scan_terms(a100, RECORDS[3], Shape(65536, 1024, 8), 65536)
        assert terms.epilogue == pytest.approx(65536 * 1024 * 16.0 / (108 * 128 * 1.41e9))

    def test_half_rate_counts_twice(self):
        terms = cuda_model.scan_terms(H100, scan("x", 1, 32, 128, 16, 3.0, half_rate=2.0), Shape(128, 64, 8), 128)
        assert terms.epilogue == pytest.approx(128 * 64 * 4.0 / H100.issue)

    def test_a_scan_on_matrix_units_by_hand(self):
        terms = cuda_model.scan_terms(H100, RECORDS[6], Shape(1024, 640, 130), 1000)
        assert terms.matrix == pytest.approx(2 * 1000 * 640 * 192 / (0.63 * 989.4e12))
        assert terms.epilogue == pytest.approx(1000 * 640 * 3.5 / H100.issue)
        # Six turns of 32 columns.
        assert terms.shared == pytest.approx(1000 * 640 * 6 * 4.0 / H100.issue)
        assert terms.cache == pytest.approx(8 * 640 * 388 / (5120 * 1.755e9))

    def test_three_products_read_both_parts(self):
        terms = cuda_model.scan_terms(H100, RECORDS[7], Shape(1024, 640, 64), 256)
        assert terms.matrix == pytest.approx(2 * 256 * 640 * 192 / (0.63 * 989.4e12))
        assert terms.cache == pytest.approx(4 * 640 * 260 / (5120 * 1.755e9))

    def test_streamed_rows_are_read_again_for_every_tile(self):
        shape = Shape(1024, 640, 1000)
        terms = cuda_model.scan_terms(H100, RECORDS[8], shape, 1000)
        assert terms.memory == pytest.approx((1000 * (4000 + 12 + 2048) + 640 * 2052) / 3.35e12)
        assert terms.cache == pytest.approx((8 * 640 * 2052 + 5 * 1000 * 2048) / (5120 * 1.755e9))
        assert terms.shared == pytest.approx(1000 * 640 * 32 * 12.0 / H100.issue)
        way = cuda_model.way_named(COUNTS, H100, "matrix", shape, uncertified_share=0.01)
        short = cuda_model.way_named(COUNTS, H100, "matrix", shape._replace(d=64), uncertified_share=0.01)
        assert way.launches == short.launches + 2

    def test_certification_reads_a_group_of_codes_a_row(self):
        terms = cuda_model.finish_terms(H100, RECORDS[1], Shape(65536, 1024, 8), 65536)
        assert terms.cache == pytest.approx(65536 * 32 * 8 * 4 / (5120 * 1.755e9))
        assert terms.memory == pytest.approx(65536 * (32 + 20) / 3.35e12)
        half = cuda_model.finish_terms(H100, RECORDS[4], Shape(65536, 1024, 8), 65536)
        assert half.cache == pytest.approx(terms.cache / 2)
        # A thread finishes a short row, eight lanes a longer one.
        assert terms.epilogue == pytest.approx(65536 * (250 + 8 * 20 + 32 * (8 * 4 + 20)) / H100.issue)
        longer = cuda_model.finish_terms(H100, RECORDS[6], Shape(65536, 1024, 65), 65536)
        assert longer.epilogue == pytest.approx(65536 * 8 * (250 + 12 * 20 + 16 * (12 * 4 + 20 + 12)) / H100.issue)

    def test_few_rows_by_hand(self):
        terms = cuda_model.few_terms(H100, Shape(9, 2048, 256), 8)
        assert terms.memory == pytest.approx((9 * 1032 + 2048 * 1024) / 3.35e12)
        assert terms.cache == pytest.approx(2 * 2048 * 1024 / (5120 * 1.755e9))
        assert cuda_model.few_terms(H100, Shape(1, 8192, 64), 8).binding == "memory"


class TestSearch:
    def test_cores_and_the_alternative_on_matrix_units(self, counts):
        predicted = model.predict("h100", Shape(65536, 1024, 4), uncertified_share=0.02)
        assert [s["kernel"] for s in predicted["cuda"]["scans"]] == [RECORDS[i]["kernel"] for i in (0, 4, 10)]
        ways = predicted["cuda"]["ways"]
        assert [way["launches"] for way in ways.values()] == [8, 10]
        own = [part for part in predicted["parts"] if part.startswith(f"{model.CUDA}: ")]
        assert own == [
            "CUDA kernels: scan on CUDA cores, all rows",
            "CUDA kernels: 32 codes a row certified, all rows",
        ]
        instead = [part for part in predicted["parts"] if part.startswith(model.CUDA_INSTEAD["matrix"])]
        assert [part.partition(": ")[2] for part in instead] == [
            "scan in 1 product, all rows",
            "16 codes a row certified, all rows",
            "scan in 3 products, 0.02 of the rows",
            "16 codes a row certified, 0.02 of the rows",
        ]
        passes = sum(max(predicted["parts"][part][name] for name in model.Terms._fields) for part in own)
        packing = 1024 * (3 * 4 * 4 + 4 * 4 + 20 + 72) / 3.35e12
        total = predicted["totals"][model.CUDA]["overlapped"]
        assert total == pytest.approx(passes + packing + 8 * model.LAUNCH_SECONDS)
        turned = model.predict("h100", Shape(65536, 1024, 8))["totals"]
        assert model.CUDA_INSTEAD["cores"] in turned
        assert model.CUDA_INSTEAD["matrix"] not in turned

    def test_few_rows_are_two_launches(self, counts):
        predicted = model.predict("h100", Shape(64, 1024, 64))
        assert predicted["cuda"]["ways"] == {model.CUDA: {"packing": 0.0, "launches": 2}}
        assert predicted["cuda"]["scans"] == []
        assert "CUDA kernels: few rows, 8 at a time" in predicted["parts"]

    @pytest.mark.parametrize("base", [Shape(65536, 8192, 1), Shape(65536, 8192, 64), Shape(4, 2048, 128)])
    @pytest.mark.parametrize("axis", ["n", "k", "d"])
    def test_more_of_anything_takes_longer(self, counts, base, axis):
        factors = (1, 2, 4) if base.d == 1 else (1, 2, 4, 8)
        times = [
            model.predict("h100", base._replace(**{axis: factor * getattr(base, axis)}))["totals"][model.CUDA]
            for factor in factors
        ]
        for how in ("overlapped", "serial"):
            assert [t[how] for t in times] == sorted({t[how] for t in times})

    def test_more_open_rows_take_longer(self, counts):
        shape = Shape(65536, 8192, 64)
        totals = [model.predict("h100", shape, uncertified_share=s)["totals"][model.CUDA] for s in (0.0, 0.1, 1.0)]
        assert [t["overlapped"] for t in totals] == sorted({t["overlapped"] for t in totals})
        parts = model.predict("h100", shape, uncertified_share=1.0)["parts"]
        assert "CUDA kernels: 16 codes a row certified, 1 of the rows" in parts

    def test_nothing_of_it_on_an_amd_device(self):
        predicted = model.predict("mi300x", Shape(65536, 8192, 8))
        assert predicted["cuda"] == {"compiler": None, "scans": [], "ways": {}}
        assert not any("CUDA" in part for part in predicted["parts"])
        assert not any("nvcc" in line for line in model.lines(predicted))


class TestCommand:
    def bench(self, *arguments):
        return main(["bench", "--n=65536", "--k=8192", "--d=8", *arguments])

    def test_printed_beside_tritons_and_the_others(self, counts, capsys):
        assert self.bench("--model=h100") == 0
        printed = capsys.readouterr().out
        assert "and in that of nvcc 13:" in printed
        assert "scan_cores<8>: 9.00 ALU instructions a distance (1.00 at half rate)" in printed
        for row in ("CUDA kernels ", "CUDA kernels, were it on CUDA cores ", "cuVS as published", "flash-kmeans as"):
            assert f"\n| {row}" in printed
        for block in printed.split("\n\n"):
            if any(unit in block for unit in (" us", " ms", " s ")):
                assert model.LABEL in block

    def test_json(self, counts, tmp_path, capsys):
        assert self.bench("--model=h100", f"--json={tmp_path / 'model.json'}") == 0
        written = json.loads((tmp_path / "model.json").read_text())
        assert written["cuda"]["scans"][0] == RECORDS[4]

    @pytest.mark.parametrize("name", ["a100", "h100", "b200"])
    @pytest.mark.parametrize("dim", [3, 8, 16, 17, 64, 200, 512, 600, 768, 1024])
    def test_from_the_shipped_counts(self, name, dim):
        for rows in (1, 1000):
            assert model.CUDA in model.predict(name, Shape(rows, 4096, dim))["totals"]

    def test_no_counts(self, monkeypatch, tmp_path, capsys):
        """The counts of triton are present, those of the CUDA kernels missing."""
        files = importlib.resources.files
        monkeypatch.setattr(
            cuda_model.importlib.resources, "files", lambda p: tmp_path if p == "fastvq.bench" else files(p)
        )
        assert self.bench("--model=h100") == 2
        error = capsys.readouterr().err
        assert "fastvq.bench has no cuda_counts.json; python csrc/cuda/counts.py --write makes it" in error

    def test_no_scan_for_a_target(self, counts):
        with pytest.raises(errors.BenchError, match=r"no scan in 1 products of 40 dimensions for sm_100"):
            model.predict("b200", Shape(100, 8, 40))
        with pytest.raises(errors.BenchError, match=r"no scan on CUDA cores of 3 dimensions for sm_100"):
            model.predict("b200", Shape(100, 8, 3))
