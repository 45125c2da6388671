"""Crash-safe checkpoints: whole or absent.

A checkpoint is a folder `RUN/checkpoints/step-00001000` with two files:

    state.safetensors   every tensor: model, optimizer, random state, running statistics
    checkpoint.json     step, settings, data fingerprint, and the SHA-256 of state.safetensors

Both are written and flushed to disk in a hidden folder, which then gets its final name in one `rename`. A process
killed at any moment leaves either no `step-` folder or a complete one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvq.errors import CheckpointError, ConfigError
from fastvq.extras import require

from .config import Settings, TrainConfig

_FORMAT = 1
_KEEP = 2
_STATE = "state.safetensors"
_DESCRIPTION = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` steps.

    Attributes:
        step: optimizer steps done.
        seconds: time spent training so far.
        config: the run's settings, an instance of a subclass of `Settings`.
        data_fingerprint: `Images.fingerprint` of the images it learned from.
        tensors: everything else, under dotted names.
        built_from: arguments of the model that the settings do not contain.
    """

    step: int
    seconds: float
    config: Any
    data_fingerprint: str
    tensors: dict[str, Tensor]
    built_from: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with `prefix.`, without that prefix."""
        start = prefix + "."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda folder: (len(folder.name), folder.name))


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, delete all but the latest two, and return its folder."""
    root = run / "checkpoints"
    final = root / f"step-{checkpoint.step:08d}"
    if final.exists():
        # The run was interrupted right after saving; the same step of the same run has the same state.
        return final
    root.mkdir(parents=True, exist_ok=True)
    for leftover in [*root.glob(".partial-step-*"), *root.glob(".discarded-step-*")]:
        shutil.rmtree(leftover)
    partial = root / f".partial-{final.name}"
    partial.mkdir()
    state = require("safetensors.torch").save({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()})
    _write_to_disk(partial / _STATE, state)
    description = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "data_fingerprint": checkpoint.data_fingerprint,
        "state_sha256": hashlib.sha256(state).hexdigest(),
        "config": checkpoint.config.to_json(),
        "built_from": checkpoint.built_from,
    }
    _write_to_disk(partial / _DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
    _flush_folder(partial)
    partial.rename(final)
    _flush_folder(root)
    for old in checkpoint_folders(run)[:-_KEEP]:
        discard(old)
    return final


def discard(folder: Path) -> None:
    """Delete a checkpoint; rename it first, so that a half-deleted one is never found."""
    hidden = folder.with_name(f".discarded-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def load_latest(run: Path, settings: type[Settings] = TrainConfig) -> Checkpoint:
    """Read the run's latest checkpoint, with settings of type `settings`.

    Raises:
        CheckpointError: the run has no checkpoint, or the latest one is damaged or of another version.
    """
    folders = checkpoint_folders(run)
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoint")
    try:
        return _load(folders[-1], settings)
    except ConfigError as error:
        raise CheckpointError(f"{folders[-1]}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        earlier = f" to continue from {folders[-2].name}" if len(folders) > 1 else " and start again"
        raise CheckpointError(f"{folders[-1]} is damaged ({error}): delete it{earlier}") from error


def _load(folder: Path, settings: type[Settings]) -> Checkpoint:
    description: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text())
    if description["format"] != _FORMAT:
        raise ConfigError(f"format {description['format']}, this version reads {_FORMAT}")
    state = (folder / _STATE).read_bytes()
    if hashlib.sha256(state).hexdigest() != description["state_sha256"]:
        raise ValueError(f"{_STATE} does not match its SHA-256")
    return Checkpoint(
        step=description["step"],
        seconds=description["seconds"],
        config=settings.from_json(description["config"]),
        data_fingerprint=description["data_fingerprint"],
        tensors=require("safetensors.torch").load(state),
        built_from=description.get("built_from", {}),
    )


def _write_to_disk(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; Windows neither has nor needs such a call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
