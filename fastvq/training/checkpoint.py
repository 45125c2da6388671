"""Crash-safe checkpoints: whole or absent, and equal to what was saved to the last bit.

A checkpoint is a folder `RUN/checkpoints/step-00001000` with two files:

    state.safetensors   every tensor: model, optimizer, random state, running statistics
    checkpoint.json     step, settings, data fingerprint, and the SHA-256 of state.safetensors

The first entry of checkpoint.json, "sha256", is the digest of all bytes after its line. Both files are written and
flushed to disk in a hidden folder, which then gets its final name in one `rename`. A process killed at any moment
leaves either no `step-` folder or a complete one. Folders of other names, such as copies, are neither read nor deleted.

Format 1, which earlier versions wrote, has no digest of checkpoint.json and is still read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.errors import CheckpointError, ConfigError, listed
from fastvq.extras import require
from fastvq.files import StrPath, delete_folder, make_folder, whole_folder
from fastvq.modalities import TrainConfig
from fastvq.modalities.settings import Settings

_FORMAT = 2
_KEEP = 2
AVERAGED = "average"
"""Prefix of the names of averaged weights."""
_STATE = "state.safetensors"
_DESCRIPTION = "checkpoint.json"
_NAME = re.compile(r"step-(?:[0-9]{8}|[1-9][0-9]{8,})")
_REMAINS = re.compile(r"\.(?:partial|discarded)-step-[0-9]{8,}")
"""Names that format 1 gave to folders that were being written or deleted."""
_SEAL = re.compile(rb'\{\n  "sha256": "([0-9a-f]{64})",\n')


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
        folder: the folder that it was read from.
    """

    step: int
    seconds: float
    config: Any
    data_fingerprint: str
    tensors: dict[str, Tensor]
    built_from: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def finished(self) -> bool:
        """True if the training has done all its steps."""
        return self.step >= self.config.steps

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with `prefix.`, without that prefix."""
        start = prefix + "."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    def trained(self) -> dict[str, Tensor]:
        """Return the weights of the trained model: the averaged ones, if they are averaged."""
        return self.part(f"{AVERAGED}.module") or self.part("model")

    def load_model(self, model: nn.Module, *, trained: bool = False) -> None:
        """Copy the weights that training goes on from into a model, or those of the trained model.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or kind, or has a NaN.
        """
        given = self.trained() if trained else self.part("model")
        for name, own in model.state_dict().items():
            # Flags such as `initted` were bool in earlier checkpoints, as in those of vector_quantize_pytorch.
            if name not in given or given[name].dtype == torch.bool:
                continue
            if own.dtype.is_floating_point != given[name].dtype.is_floating_point:
                raise ValueError(f"model.{name} is {given[name].dtype}, expected {own.dtype}")
            if bool(given[name].isnan().any()):
                raise ValueError(f"model.{name} has a NaN")
        try:
            model.load_state_dict(given)
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())) from error

    def tensor_like(self, name: str, like: Tensor) -> Tensor:
        """Return the tensor of a name, which has the shape and dtype of another one.

        Raises:
            ValueError: it is missing, or of another shape or dtype.
        """
        if name not in self.tensors:
            raise ValueError(f"{name} is missing")
        tensor = self.tensors[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(like.shape)} {like.dtype}"
            )
        return tensor

    def same_state(self, other: Checkpoint) -> bool:
        """Return whether two checkpoints differ in nothing but the time spent."""
        return (
            (self.step, self.config, self.data_fingerprint) == (other.step, other.config, other.data_fingerprint)
            and json.dumps(self.built_from, sort_keys=True) == json.dumps(other.built_from, sort_keys=True)
            and self.tensors.keys() == other.tensors.keys()
            and all(_same_bits(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
        )


def checkpoint_folders(run: StrPath) -> list[Path]:
    """Return the run's checkpoints, oldest first; folders of other names, and links, are none."""
    root = Path(run) / "checkpoints"
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=_step_of)


def save(run: StrPath, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, delete all but the latest two, and return its folder.

    Raises:
        CheckpointError: another training has saved this step with another state, or a later step.
    """
    root = Path(run) / "checkpoints"
    final = root / f"step-{checkpoint.step:08d}"
    there = checkpoint_folders(run)
    if there and _step_of(there[-1]) > checkpoint.step:
        raise CheckpointError(
            f"{there[-1]} was written by another training: step {checkpoint.step} of this one is not saved"
        )
    if final in there:
        with damage_named(final):
            same = _read(final, type(checkpoint.config)).same_state(checkpoint)
        if not same:
            raise CheckpointError(f"{final} was written by another training: its state is not the one to be saved")
        return final
    make_folder(root)
    for leftover in [path for path in root.iterdir() if _REMAINS.fullmatch(path.name)]:
        delete_folder(leftover)
    state = require("safetensors.torch").save({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()})
    description = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "data_fingerprint": checkpoint.data_fingerprint,
        "state_sha256": hashlib.sha256(state).hexdigest(),
        "config": checkpoint.config.to_json(),
        "built_from": checkpoint.built_from,
    }
    with whole_folder(final) as partial:
        for name, content in ((_STATE, state), (_DESCRIPTION, seal(description))):
            with (partial / name).open("xb") as file:
                file.write(content)
    for old in checkpoint_folders(run)[:-_KEEP]:
        delete_folder(old)
    return final


def seal(description: dict[str, Any]) -> bytes:
    """Return the content of a checkpoint.json, with the digest that `load_latest` verifies."""
    rest = json.dumps(description, indent=2).removeprefix("{\n").encode() + b"\n"
    return b'{\n  "sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


def load_latest(run: StrPath, settings: type[Settings] = TrainConfig, *, tensors: bool = True) -> Checkpoint:
    """Read the run's latest checkpoint, with settings of type `settings`; without `tensors`, only what describes it.

    Raises:
        CheckpointError: the run has no checkpoint, or the latest one is damaged or of another version.
    """
    folders = checkpoint_folders(run)
    if not folders:
        raise CheckpointError(_why_none(Path(run)))
    with damage_named(folders[-1]):
        return _read(folders[-1], settings, tensors=tensors)


def load_checkpoint(folder: StrPath, settings: type[Settings] = TrainConfig) -> Checkpoint:
    """Read the checkpoint in a folder of any name, such as a copy, with settings of type `settings`.

    Raises:
        CheckpointError: the checkpoint is damaged or of another version.
    """
    folder = Path(folder)
    with damage_named(folder):
        return _read(folder, settings)


def is_checkpoint(folder: StrPath) -> bool:
    """Return whether a folder is a checkpoint, perhaps a damaged one, by the names of its files."""
    return any((Path(folder) / name).is_file() for name in (_DESCRIPTION, _STATE))


def _why_none(run: Path) -> str:
    """Return the message of a run without a checkpoint; it names the runs that are in this folder."""
    if not run.is_dir():
        return f"{run} holds no checkpoint: it {'is not a folder' if run.exists() else 'does not exist'}"
    within = sorted(str(path) for path in run.iterdir() if checkpoint_folders(path))
    return f"{run} holds no checkpoint" + (f", but these runs:{listed(within)}" if within else "")


@contextlib.contextmanager
def damage_named(folder: Path | None) -> Iterator[None]:
    """Turn errors about the content of a checkpoint into a CheckpointError that names it and the way out."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        earlier = checkpoint_folders(folder.parent.parent)[:-1] if folder is not None else []
        way_out = f" to continue from {earlier[-1].name}" if earlier else " and start again"
        raise CheckpointError(f"{folder} is damaged ({error}): delete it{way_out}") from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _read(folder: Path, settings: type[Settings], *, tensors: bool = True) -> Checkpoint:
    description = _description((folder / _DESCRIPTION).read_bytes())
    state = (folder / _STATE).read_bytes() if tensors else None
    if state is not None and hashlib.sha256(state).hexdigest() != description.get("state_sha256"):
        raise ValueError(f"{_STATE} does not match its SHA-256")
    step, seconds = description.get("step"), description.get("seconds")
    named = _step_of(folder) if _NAME.fullmatch(folder.name) else step
    if type(step) is not int or step < 0 or step != named:
        raise ValueError(f"{_DESCRIPTION} is of step {step!r}")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"{_DESCRIPTION} has {seconds!r} seconds")
    fingerprint, built_from = description.get("data_fingerprint"), description.get("built_from", {})
    if not isinstance(fingerprint, str) or not isinstance(built_from, dict):
        raise ValueError(f"{_DESCRIPTION} has a data_fingerprint or built_from of another type")
    return Checkpoint(
        step=step,
        seconds=seconds,
        config=settings.from_json(description.get("config")),
        data_fingerprint=fingerprint,
        tensors={} if state is None else _tensors(state),
        built_from=built_from,
        folder=folder,
    )


def _description(content: bytes) -> dict[str, Any]:
    """Return the content of a checkpoint.json.

    Raises:
        ConfigError: it is of an unknown format.
        ValueError: it is damaged.
    """
    try:
        description = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{_DESCRIPTION} is nested too deeply") from error
    if not isinstance(description, dict):
        raise ValueError(f"{_DESCRIPTION} is no JSON object")
    version = description.get("format")
    if type(version) is not int or version < 1:
        raise ValueError(f"{_DESCRIPTION} has format {version!r}")
    if version > _FORMAT:
        raise ConfigError(f"format {version}, this version reads 1 to {_FORMAT}")
    if version > 1 or "sha256" in description:
        sealed = _SEAL.match(content)
        if not sealed or hashlib.sha256(content[sealed.end() :]).hexdigest().encode() != sealed[1]:
            raise ValueError(f"{_DESCRIPTION} does not match its SHA-256")
    return description


def _tensors(state: bytes) -> dict[str, Tensor]:
    load = require("safetensors.torch").load
    try:
        return load(state)
    except Exception as error:  # safetensors raises exceptions of its own
        raise ValueError(f"{_STATE} cannot be read: {error}") from error


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    first, second = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)
