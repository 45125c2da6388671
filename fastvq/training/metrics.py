"""Records in metrics.jsonl: one JSON object per line, in step order, without gaps or duplicates after a resume."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """Return all complete records of a metrics.jsonl; a last line cut off by a kill is dropped."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"\n")]


class MetricsLog:
    """Writer of metrics.jsonl, and of TensorBoard scalars if TensorBoard is installed.

    Args:
        folder: gets `metrics.jsonl` and, with TensorBoard, `tensorboard/`.
        step: records of later steps are dropped first, as these steps will be repeated.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        path.touch()
        keep = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                keep += len(line)
        os.truncate(path, keep)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, **values: float | None) -> None:
        """Append `{"step": step, "split": split, **values}`."""
        # Flushed to the operating system at once, so that a killed process loses no record.
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def flush_to_disk(self) -> None:
        """Wait until all records are on disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
