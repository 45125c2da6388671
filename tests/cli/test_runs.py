"""Commands on finished runs, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvq.cli.main import main
from fastvq.runs.train_prior import train_prior
from fastvq.training.config import PriorConfig

from ..tiny_runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, _ = tiny_run(tmp_path_factory.mktemp("runs"), count=30, grayscale=True)
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1), progress=False)
    return run


def test_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert main(["evaluate", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    psnr = json.loads(out.read_text())["measures"]["psnr_db"]["value"]
    [line] = [line for line in printed.out.splitlines() if line.startswith("PSNR of the mean")]
    assert f"{psnr:.2f}" in line.split()
    assert printed.err == ""
    assert main(["evaluate", str(run), "--out", "numbers.txt"]) == 2
    assert capsys.readouterr().err == "fastvq: --out must end in .json, got numbers.txt\n"
    assert main(["evaluate", str(run), "--device", "nowhere"]) == 2
    assert "fastvq: --device: 'nowhere' cannot be used here" in capsys.readouterr().err
