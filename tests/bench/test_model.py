"""Predicted times: terms by hand, binding terms, labels on all output, and errors that name the argument."""

from __future__ import annotations

import importlib.resources
import json
import math
import subprocess
import sys

import pytest

from fastvq import errors
from fastvq.bench import model
from fastvq.bench.data import Shape
from fastvq.cli.main import main


def scan(terms, block_d, *, chunks=1, beside=False, alu=2.0, half_rate=1.5, target="sm_90", **other):
    columns = terms * (block_d * chunks + 16 * beside)
    config = {
        "LISTED": terms == 3, "TERMS": terms, "BESIDE": beside, "WIDE": False, "SPLIT": False, "BLOCK_N": 128,
        "BLOCK_K": 64, "BLOCK_D": block_d, "CHUNKS": chunks, "num_warps": 8, "types": "fp32 fp16",
    } | other  # fmt: skip
    counts = {"alu": alu, "half_rate": half_rate, "columns": columns}
    return {"kernel": "_scan", "target": target, "config": config, **counts}


RECORDS = [
    scan(1, 16),
    scan(1, 16, alu=9.0),
    scan(1, 64),
    scan(1, 64, beside=True, alu=2.5),
    scan(1, 64, chunks=4, beside=True, alu=3.0),
    scan(1, 64, WIDE=True, alu=0.1),
    scan(3, 16, alu=5.0),
    scan(3, 64, alu=5.0),
    scan(3, 64, chunks=4, alu=7.0, SPLIT=True),
    scan(1, 16, alu=0.1, SPLIT=True),
    scan(1, 16, alu=0.1, n=1),
    {"kernel": "_define", "target": "sm_90", "config": {"BLOCK_K": 64}},
    {"kernel": "_other", "target": "sm_90", "config": {"BLOCK_N": 16, "BLOCK_K": 64}, "alu": 1.0, "columns": 16.0},
]


@pytest.fixture
def counts(monkeypatch):
    stored = {"triton": "3.9.0", "records": RECORDS}
    monkeypatch.setattr(model, "load_counts", lambda: stored)
    return stored


def bench(*arguments):
    return main(["bench", "--n=65536", "--k=1024", "--d=64", *arguments])


class TestTerms:
    def test_one_scan_by_hand(self):
        h100 = model.DEVICES["h100"]
        terms = model.scan_terms(h100, scan(1, 64, beside=True, alu=2.5), Shape(65536, 1024, 62), 65536)
        assert terms.matrix == pytest.approx(2 * 65536 * 1024 * 80 / 989.4e12)
        # 1.5 of 2.5 instructions at half rate hold their unit as long as 3.
        assert terms.epilogue == pytest.approx(65536 * 1024 * 3.0 / (132 * 128 * 1.755e9))
        # A row is read and its index written; a code is 64 float16 and half its square.
        assert terms.memory == pytest.approx((65536 * (62 * 4 + 8) + 1024 * 132) / 3.35e12)
        assert terms.cache == pytest.approx(512 * 1024 * 132 / (5120 * 1.755e9))
        assert terms.binding == "matrix"
        assert terms.overlapped == terms.matrix
        assert terms.serial == pytest.approx(terms.matrix + terms.epilogue)

    def test_instructions_at_full_rate(self):
        terms = model.scan_terms(model.DEVICES["h100"], scan(1, 16, alu=4.0), Shape(128, 64, 8), 128)
        assert terms.epilogue == pytest.approx(128 * 64 * 4.0 / 29.65e12, rel=1e-3)
        flattered = model.scan_terms(model.DEVICES["h100"], scan(1, 16), Shape(128, 64, 8), 128, flattered=True)
        assert flattered.epilogue == pytest.approx(128 * 64 * 2.0 / 29.65e12, rel=1e-3)

    def test_long_rows_are_read_again_for_every_tile(self):
        """D=512 by a kernel compiled for four chunks of 64: it takes eight."""
        terms = model.scan_terms(model.DEVICES["h100"], scan(1, 64, chunks=4), Shape(1024, 640, 500), 1024)
        assert terms.matrix == pytest.approx(2 * 1024 * 640 * 512 / 989.4e12)
        assert terms.cache == pytest.approx((8 * 640 * 1028 + 10 * 1024 * 1024) / (5120 * 1.755e9))

    def test_three_products_read_both_parts(self):
        terms = model.scan_terms(model.DEVICES["h100"], scan(3, 64), Shape(1024, 640, 64), 256)
        assert terms.matrix == pytest.approx(2 * 256 * 640 * 192 / 989.4e12)
        assert terms.cache == pytest.approx(2 * 640 * 260 / (5120 * 1.755e9))

    def test_others_by_hand(self):
        h100 = model.DEVICES["h100"]
        bf16, tf32, cuvs, plain = (model.rival_terms(h100, rival, Shape(65536, 1024, 8)) for rival in model.RIVALS)
        pairs = 65536 * 1024
        assert (bf16.matrix, tf32.matrix) == pytest.approx((2 * pairs * 16 / 989.4e12, 4 * pairs * 16 / 989.4e12))
        assert bf16.epilogue == tf32.epilogue == pytest.approx(6.5 / 4.4 * plain.epilogue)
        assert tf32.memory == pytest.approx((65536 * 40 + 1024 * 36) / 3.35e12)
        # Three products of tf32 by mma.sync, in tiles of 32 rows.
        assert cuvs.matrix == pytest.approx(3 * tf32.matrix / 0.63)
        assert cuvs.cache == pytest.approx(4 * tf32.cache)

    @pytest.mark.parametrize(("dim", "published"), [(64, 20.0e-3), (128, 21.1e-3), (256, 29.4e-3)])
    def test_no_published_time_is_below_its_roof(self, dim, published):
        """The time of flash-kmeans on a B200, bf16, N = 1M and K = 65536, published by its authors."""
        terms = model.rival_terms(model.DEVICES["b200"], model.RIVALS[0], Shape(1_000_000, 65536, dim))
        assert published / 2 < terms.overlapped < published
        assert terms.serial < published

    def test_lane_rates_of_the_data_sheets(self):
        rates = {name: d.units * d.lanes * d.clock for name, d in model.DEVICES.items()}
        published = {"a100": 19.5e12, "h100": 29.65e12, "h200": 29.65e12, "b200": 35.2e12, "mi300x": 40.9e12}
        assert rates == pytest.approx(published, rel=5e-3)


class TestChoice:
    @pytest.mark.parametrize(
        ("dim", "products", "expected"),
        [
            (8, 1, RECORDS[0]),
            (16, 1, RECORDS[0]),
            (40, 1, RECORDS[2]),
            (61, 1, RECORDS[2]),
            (62, 1, RECORDS[3]),
            (64, 1, RECORDS[3]),
            (65, 1, RECORDS[4]),
            (1000, 1, RECORDS[4]),
            (16, 3, RECORDS[6]),
            (200, 3, RECORDS[8]),
        ],
    )
    def test_selected_scan(self, counts, dim, products, expected):
        assert model.scan_for(counts, "sm_90", dim, products) is expected

    def test_no_scan_for_a_target(self, counts):
        with pytest.raises(errors.BenchError, match=r"counts.json has no scan of 1 products for sm_80"):
            model.predict("a100", Shape(8, 8, 8))


class TestSearch:
    def test_it_is_the_sum_of_its_parts(self, counts):
        predicted = model.predict("h100", Shape(65536, 1024, 256), uncertified_share=0.02)
        parts = predicted["parts"]
        first, again = parts["1 product, all rows"], parts["3 products, 0.02 of the rows"]
        # Two scans with rows prepared for each, one split; four of packing, one definition, three fills.
        assert predicted["launches"] == 2 + 3 + 4 + 1 + 3
        assert predicted["packing"] == pytest.approx(1024 * (3 * 256 * 4 + 4 * 256 + 20 + 72) / 3.35e12)
        total = predicted["totals"]["search, 0.02 of the rows uncertified"]["overlapped"]
        passes = sum(max(part[name] for name in model.Terms._fields) for part in (first, again))
        assert total == pytest.approx(passes + predicted["packing"] + 13 * model.LAUNCH_SECONDS)
        assert predicted["totals"]["search, 0.05 of the rows uncertified"]["overlapped"] > total
        assert predicted["totals"]["search, 0.02 of the rows uncertified, counted as the others"]["overlapped"] <= total

    @pytest.mark.parametrize("axis", ["n", "k", "d"])
    @pytest.mark.parametrize("how", ["overlapped", "serial"])
    def test_more_of_anything_takes_longer(self, counts, axis, how):
        base = Shape(65536, 8192, 64)
        totals = [
            model.predict("h100", base._replace(**{axis: factor * getattr(base, axis)}))["totals"]
            for factor in (1, 2, 4, 16)
        ]
        for name in totals[0]:
            times = [total[name][how] for total in totals]
            assert times == sorted(times)
            assert len(set(times)) == len(times) or (axis == "d" and how == "overlapped")

    def test_more_open_rows_take_longer(self, counts):
        times = []
        for share in (0.0, 0.1, 1.0):
            totals = model.predict("h100", Shape(65536, 8192, 64), uncertified_share=share)["totals"]
            times.append(totals[f"search, {share:.3g} of the rows uncertified"]["overlapped"])
        assert times == sorted(set(times))

    @pytest.mark.parametrize(
        ("record", "dim", "binding"),
        [(scan(1, 16), 8, "epilogue"), (scan(1, 256), 253, "matrix"), (scan(1, 64, chunks=4), 256, "cache")],
    )
    def test_binding_term(self, monkeypatch, record, dim, binding):
        """The epilogue binds short vectors, the matrix units long ones, unless rows are read again for each tile."""
        records = [record, scan(3, 64, chunks=4)]
        monkeypatch.setattr(model, "load_counts", lambda: {"triton": "3.9.0", "records": records})
        predicted = model.predict("h100", Shape(262144, 16384, dim))
        assert predicted["parts"]["1 product, all rows"]["binding"] == binding


class TestCommand:
    def test_everything_printed_is_labeled(self, counts, capsys):
        assert bench("--model=h100") == 0
        printed = capsys.readouterr().out
        blocks = [block for block in printed.split("\n\n") if any(unit in block for unit in (" us", " ms", " s "))]
        assert len(blocks) == 3
        assert all("prediction, not a measurement" in block for block in [printed.split("\n\n")[0], *blocks])
        assert printed.startswith("prediction, not a measurement: N=65536 K=1024 D=64 on h100\n")
        for row in (
            "search, 0.01 of the rows uncertified",
            "search, 0.05 of the rows uncertified",
            "flash-kmeans as published, bf16",
        ):
            assert f"| {row}" in printed
        assert "measured" not in printed.replace("not a measurement", "")

    def test_json(self, counts, capsys, tmp_path):
        assert (
            bench("--model=h100", f"--json={tmp_path / 'model.json'}", "--uncertified-share=0.5", "--dtype=bfloat16")
            == 0
        )
        written = json.loads((tmp_path / "model.json").read_text())
        expected = model.predict("h100", Shape(65536, 1024, 64), uncertified_share=0.5, element=2)
        assert written == json.loads(json.dumps(expected))
        assert written["what"] == "prediction, not a measurement"
        assert math.isclose(written["parts"]["1 product, all rows"]["memory"], (65536 * 136 + 1024 * 132) / 3.35e12)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model=h300"], "--model: must be one of a100, h100, h200, b200, mi300x, got 'h300'"),
            (["--model=h100", "--n=0"], "--n: must be at least 1, got 0"),
            (["--model=h100", "--d=-3"], "--d: must be at least 1, got -3"),
            (["--model=h100", "--dtype=int8"], "--dtype: must be one of float32, float16, bfloat16, got 'int8'"),
            (["--model=h100", "--uncertified-share=1.5"], "--uncertified-share: must be from 0 to 1, got 1.5"),
            (["--model=h100", "--uncertified-share=nan"], "--uncertified-share: must be from 0 to 1, got nan"),
        ],
    )
    def test_errors_name_the_argument(self, counts, capsys, arguments, message):
        assert bench(*arguments) == 2
        assert message in capsys.readouterr().err

    def test_without_triton_from_the_shipped_counts(self):
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "from fastvq.cli.main import main\n"
            "for name in sys.argv[1:]:\n"
            "    assert main(['bench', '--model', name, '--n=65536', '--k=1024', '--d=64']) == 0, name"
        )
        command = [sys.executable, "-c", code, *model.DEVICES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for name in model.DEVICES:
            assert f"on {name}" in done.stdout

    def test_no_counts(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
        assert bench("--model=h100") == 2
        assert "fastvq.kernels has no counts.json" in capsys.readouterr().err


class TestBesideMeasured:
    def test_a_known_device(self, counts):
        contestants = [{"name": "fastvq torch", "seconds": 2.0}, {"name": "fastvq triton", "seconds": 0.5}]
        _, line = model.beside_measured("NVIDIA H100 80GB HBM3", Shape(65536, 1024, 64), contestants)
        assert line.startswith("fastvq triton, measured: 500 ms; prediction, not a measurement: ")

    def test_triton_has_not_run(self, counts):
        contestants = [{"name": "fastvq triton", "not_run": "no"}]
        _, line = model.beside_measured("NVIDIA H100 80GB HBM3", Shape(65536, 1024, 64), contestants)
        assert line.startswith("prediction, not a measurement: ")

    @pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB"])
    def test_other_devices_have_no_prediction(self, counts, name):
        assert model.beside_measured(name, Shape(8, 8, 8), []) == []

    def test_a_device_without_counts(self, counts):
        assert "no scan of 1 products" in model.beside_measured("AMD Instinct MI300X", Shape(8, 8, 8), [])[1]
