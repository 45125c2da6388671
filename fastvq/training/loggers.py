"""Loggers that a training writes its records to, beside metrics.jsonl: TensorBoard, Weights & Biases, a CSV file."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastvq.errors import ConfigError, MissingExtraError, first_line
from fastvq.extras import require
from fastvq.files import StrPath, whole

LOGGER_NAMES = ("tensorboard", "wandb", "csv", "none")
CSV_FILE = "metrics.csv"


class Logger(Protocol):
    """Receiver of the records of a training, step by step."""

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Take the measures of one step."""

    def close(self) -> None:
        """End the log."""


def check_logger(name: str | None) -> None:
    """Check that a logger can be used, before anything is loaded or trained; None is the default.

    Raises:
        ConfigError: no logger has this name.
        MissingExtraError: its package is not installed.
    """
    if name is not None and name not in LOGGER_NAMES:
        raise ConfigError(f"logger must be one of {', '.join(LOGGER_NAMES)}, got {name!r}")
    if name in ("tensorboard", "wandb"):
        require(name, "loggers")


def open_logger(
    name: str | None, folder: StrPath, records: Sequence[dict[str, Any]], step: int, settings: dict[str, Any]
) -> Logger | None:
    """Return a logger, or None for "none", and by default where TensorBoard is not installed.

    Args:
        name: one of `LOGGER_NAMES`; by default TensorBoard.
        folder: folder of the training.
        records: those of the steps up to `step`.
        step: the step that the training continues from.
        settings: those of the training.
    """
    check_logger(name)
    if name is None and importlib.util.find_spec("tensorboard") is not None:
        name = "tensorboard"
    if name == "tensorboard":
        return _TensorBoard(folder, step)
    if name == "wandb":
        return _Wandb(folder, settings)
    return _Csv(folder, records) if name == "csv" else None


class _TensorBoard:
    """Scalars in `tensorboard/`."""

    def __init__(self, folder: StrPath, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases, of the project "fastvq"; a training that is resumed goes on in the same one."""

    def __init__(self, folder: StrPath, settings: dict[str, Any]) -> None:
        place = Path(folder).resolve()
        identity = hashlib.sha256(str(place).encode(errors="surrogateescape")).hexdigest()[:16]
        about = {"project": "fastvq", "name": place.name, "id": identity, "config": settings}
        try:
            self._run = require("wandb", "loggers").init(dir=str(folder), resume="allow", **about)
        except MissingExtraError:
            raise
        except Exception as error:  # no account, no network
            raise ConfigError(
                f"logger: wandb cannot begin: {first_line(error)} (WANDB_MODE=offline needs no account)"
            ) from error

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Csv:
    """`metrics.csv` with a line for each measure: step, split, name, value."""

    def __init__(self, folder: StrPath, records: Sequence[dict[str, Any]]) -> None:
        # Written anew from the records that are kept: steps that will be repeated must not stand there twice.
        path = Path(folder) / CSV_FILE
        with whole(path) as file:
            file.write(b"step,split,name,value\n")
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        for record in records:
            values = {name: value for name, value in record.items() if name not in ("step", "split")}
            self.write(record["step"], record["split"], {n: v for n, v in values.items() if v is not None})

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        self._writer.writerows([step, split, name, value] for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()
