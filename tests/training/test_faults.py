"""A training in which each write, flush, rename and call fails in turn resumes to the same last bit."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvq import files
from fastvq.data import Examples
from fastvq.files import write_whole
from fastvq.modalities import ImageConfig
from fastvq.training import Evaluation, Trainer, checkpoint
from fastvq.training.metrics import MetricsLog, read_metrics

# Two evaluations, one of them at a step that would have no checkpoint otherwise, and three checkpoints.
CONFIG = ImageConfig(
    data="noise", image_size=8, codebook_size=4, dim=4, dead_code_threshold=2, width=4, residual_width=2,
    encoder_blocks=0, decoder_blocks=0, steps=4, batch_size=4, warmup_steps=1, log_every=1, evaluate_every=2,
    checkpoint_every=3,
)  # fmt: skip
FAULTS: list[Callable[[], BaseException]] = [
    lambda: OSError(errno.ENOSPC, "No space left on device"),
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: RuntimeError("a fault of another kind"),
    KeyboardInterrupt,
]


def noise() -> Examples:
    pixels = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Examples("noise", pixels[:8], pixels[8:], ("",) * 4)


class Faults:
    """Count of the calls that touch a disk, of which one raises."""

    def __init__(self, fail_at: int | None, fault: Callable[[], BaseException]) -> None:
        self.calls: list[str] = []
        self.fail_at, self.fault = fail_at, fault

    def reach(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.fail_at:
            raise self.fault()

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.reach(name)
            return function(*arguments, **options)

        return call

    def writing(self, file: Any) -> Any:
        return _Writing(file, self)


class _Writing:
    """File of which each write is counted; one that fails has written half."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        try:
            self._faults.reach("write")
        except BaseException:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)


@pytest.fixture
def inject() -> Callable[[Faults], pytest.MonkeyPatch]:
    """Return a function that puts faults in place, and what takes them back."""
    open_path, open_file = Path.open, open

    def put(faults: Faults) -> pytest.MonkeyPatch:
        patch = pytest.MonkeyPatch()
        for name in ("fsync", "replace", "rename", "mkdir", "truncate", "ftruncate"):
            patch.setattr(os, name, faults.before(name, getattr(os, name)))
        patch.setattr(files.shutil, "rmtree", faults.before("rmtree", files.shutil.rmtree))
        patch.setattr(files, "open", lambda *a, **k: faults.writing(open_file(*a, **k)), raising=False)

        def open_counted(path: Path, mode: str = "r", **options: Any) -> Any:
            file = open_path(path, mode, **options)
            return faults.writing(file) if mode in ("a", "xb") else file

        patch.setattr(Path, "open", open_counted)
        patch.setattr(Trainer, "evaluate", faults.before("evaluate", Trainer.evaluate))
        patch.setattr(Trainer, "learn", faults.before("learn", Trainer.learn))
        return patch

    return put


def train(folder: Path, faults: Faults | None = None, *, resume: bool = False) -> Trainer:
    """Train, and write a file as a picture of each evaluation."""

    def draw(trainer: Trainer, evaluation: Evaluation) -> None:
        if faults is not None:
            faults.reach("picture")
        write_whole(folder / f"picture-{trainer.step}", f"{evaluation.psnr_db}")

    trainer = Trainer(CONFIG, noise(), folder, resume=resume)
    trainer.fit(on_evaluation=draw, progress=False)
    return trainer


def outcome(folder: Path) -> tuple[Any, ...]:
    """Return all that a training leaves: state, records and pictures."""
    latest = checkpoint.load_latest(folder)
    pictures = {path.name: path.read_text() for path in folder.glob("picture-*")}
    # One more may be left where the deletion of an earlier one failed.
    steps = [path.name for path in checkpoint.checkpoint_folders(folder)[-2:]]
    return (
        latest,
        read_metrics(folder / "metrics.jsonl"),
        pictures,
        steps,
    )


def test_every_fault_in_turn_and_the_resume_is_bit_equal(
    tmp_path: Path, inject: Callable[[Faults], pytest.MonkeyPatch]
) -> None:
    train(tmp_path / "first")  # what libraries write at their first use is not counted
    counted = Faults(None, KeyboardInterrupt)
    patch = inject(counted)
    try:
        train(tmp_path / "whole", counted)
    finally:
        patch.undo()
    expected, records, pictures, steps = outcome(tmp_path / "whole")
    assert sorted(pictures) == ["picture-2", "picture-4"]
    assert steps == ["step-00000003", "step-00000004"]
    for name in ("write", "fsync", "replace", "rename", "rmtree", "truncate", "evaluate", "learn", "picture"):
        assert name in counted.calls
    assert len(counted.calls) > 55
    for at in range(len(counted.calls)):
        folder, faults = tmp_path / f"fault{at}", Faults(at, FAULTS[at % len(FAULTS)])
        patch = inject(faults)
        try:
            with pytest.raises((OSError, RuntimeError, KeyboardInterrupt)):
                train(folder, faults)
        finally:
            patch.undo()
        assert len(faults.calls) > at, "the fault was not reached"
        resumed = train(folder, resume=bool(checkpoint.checkpoint_folders(folder)))
        assert resumed.step == CONFIG.steps
        state, *others = outcome(folder)
        assert state.same_state(expected), f"{counted.calls[at]}, call {at}"
        assert others == [records, pictures, steps], f"{counted.calls[at]}, call {at}"
        assert not list(folder.rglob(".fastvq-*")), f"{counted.calls[at]}, call {at}"


def test_records_up_to_a_checkpoint_are_on_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush, rename = MetricsLog.flush_to_disk, os.rename
    monkeypatch.setattr(MetricsLog, "flush_to_disk", lambda log: (order.append("records"), flush(log))[1])
    monkeypatch.setattr(os, "rename", lambda *a: (order.append(Path(a[1]).name), rename(*a))[1])
    Trainer(CONFIG, noise(), tmp_path).fit(progress=False)
    named = [name for name in order if not name.startswith(".fastvq")]
    assert named == [part for step in (2, 3, 4) for part in ("records", f"step-{step:08d}")]
