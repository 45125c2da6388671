"""Loggers beside metrics.jsonl."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastvq.cli.main import main
from fastvq.errors import ConfigError, MissingExtraError
from fastvq.training import Trainer
from fastvq.training.loggers import check_logger
from fastvq.training.metrics import MetricsLog, read_metrics

from .tiny import TINY, tiny_images


def test_csv_has_the_records_of_the_run_also_after_a_resume(tmp_path: Path) -> None:
    for step in (0, 1):
        with MetricsLog(tmp_path, step=step, logger="csv") as log:
            log.write(step + 1, "train", loss=0.5, usage=None)
            log.write(step + 1, "test", psnr_db=float(step))
            log.write(step + 2, "train", loss=9.0)  # lost by the next one, which goes on before it
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    expected = [
        [str(record["step"]), record["split"], name, str(value)]
        for record in read_metrics(tmp_path / "metrics.jsonl")
        for name, value in record.items()
        if name not in ("step", "split") and value is not None
    ]
    assert rows == [["step", "split", "name", "value"], *expected]
    assert len(rows) == 6


class Wandb(types.ModuleType):
    """Stand-in that keeps what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("wandb")
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = False
        self.error = error

    def init(self, **settings: Any) -> Wandb:
        if self.error is not None:
            raise self.error
        self.begun = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended = True


def test_wandb_gets_settings_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Trainer(TINY, tiny_images(), tmp_path / "mine").fit(logger="wandb", progress=False)
    assert (wandb.begun["project"], wandb.begun["name"], wandb.begun["resume"]) == ("fastvq", "mine", "allow")
    assert wandb.begun["config"] == TINY.to_json()
    assert wandb.ended
    records = read_metrics(tmp_path / "mine" / "metrics.jsonl")
    assert [step for step, _ in wandb.logged] == [record["step"] for record in records]
    assert wandb.logged[0][1]["train/loss"] == records[0]["loss"]
    assert not (tmp_path / "mine" / "tensorboard").exists()


def test_an_error_of_wandb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb(RuntimeError("no account\nhelp")))
    with pytest.raises(ConfigError, match=r"^logger: wandb cannot begin: no account \(WANDB_MODE=offline"):
        MetricsLog(tmp_path, step=0, logger="wandb")


def test_none_is_none(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, step=0, logger="none") as log:
        log.write(1, "train", loss=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=f"^{name} is missing: pip install .*loggers"):
        check_logger(name)
    for command in (["train", f"--out={tmp_path}"], ["prior", str(tmp_path)]):
        assert main([*command, f"--logger={name}"]) == 2
        assert f"fastvq: {name} is missing" in capsys.readouterr().err
    assert main(["train", f"--out={tmp_path}", "--logger=mlflow"]) == 2
    assert "--logger must be one of tensorboard, wandb, csv, none, got 'mlflow'" in capsys.readouterr().err
