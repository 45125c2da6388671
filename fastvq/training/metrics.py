"""Records in metrics.jsonl: one JSON object per line, in step order, without gaps or duplicates after a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from fastvq.errors import CheckpointError
from fastvq.files import StrPath, make_folder

from .loggers import check_logger, open_logger

Record = dict[str, Any]


def read_metrics(path: StrPath) -> list[Record]:
    """Return all complete records of a metrics.jsonl; a last line cut off by a kill is dropped.

    Raises:
        CheckpointError: a line is no record, or the steps are out of order.
    """
    return [record for record, _ in _records(path)]


def _records(path: StrPath) -> Iterator[tuple[Record, int]]:
    """Yield each complete record with the position after it."""
    position = step = 0
    path = Path(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            position += len(line)
            try:
                record = json.loads(line.decode("utf-8"))
                fault = _fault(record, step)
            except (ValueError, RecursionError) as error:
                fault = str(error)
            if fault:
                raise CheckpointError(f"{path} is damaged in line {number} ({fault}): delete the line")
            yield record, position
            step = record["step"]


def _fault(record: Any, earlier: int) -> str | None:
    """Return what is wrong with a record that follows one of the step `earlier`."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or not isinstance(record.get("split"), str):
        return "it is no record of a step"
    if record["step"] < max(1, earlier):
        return f"step {record['step']} follows step {earlier}"
    for name, value in record.items():
        if name != "split" and value is not None and type(value) not in (int, float):
            return f"{name} is {value!r}"
    return None


class MetricsLog:
    """Writer of metrics.jsonl, and of a logger beside it.

    Args:
        folder: gets `metrics.jsonl`, and what the logger writes there.
        step: records of later steps are dropped first, as these steps will be repeated.
        logger: one of `LOGGER_NAMES`; by default TensorBoard where it is installed.
        settings: those of the training, for loggers that show them.

    Raises:
        CheckpointError: metrics.jsonl is damaged.
        ConfigError, MissingExtraError: see `check_logger`.
    """

    def __init__(
        self, folder: StrPath, *, step: int, logger: str | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        check_logger(logger)
        folder = Path(folder)
        make_folder(folder)
        path = folder / "metrics.jsonl"
        path.touch()
        kept = [(record, position) for record, position in _records(path) if record["step"] <= step]
        os.truncate(path, max((position for _, position in kept), default=0))
        self._file = path.open("a", encoding="utf-8")
        records = [record for record, _ in kept]
        self._logger = open_logger(logger, folder, records, step, settings or {})

    def write(self, step: int, split: str, **values: float | None) -> None:
        """Append `{"step": step, "split": split, **values}`."""
        # Flushed to the operating system at once, so that a killed process loses no record.
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        if self._logger is not None:
            self._logger.write(step, split, {name: value for name, value in values.items() if value is not None})

    def flush_to_disk(self) -> None:
        """Wait until all records are on disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._logger is not None:
            self._logger.close()
