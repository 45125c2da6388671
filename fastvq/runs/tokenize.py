"""A data set as arrays of indices, for models that are trained elsewhere: sharded, resumable, by several processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq import distributed
from fastvq.coding import fingerprint
from fastvq.data import DATA_SETS, Examples
from fastvq.data.examples import to_float
from fastvq.data.folder import numbered, report_failures
from fastvq.data.index_shards import MANIFEST, digest_of_file, seal_of
from fastvq.data.reader import Format
from fastvq.data.registry import check_outside, describe_choices
from fastvq.data.source import Item, Source, open_source
from fastvq.errors import ConfigError, DataError, counted
from fastvq.extras import Progress
from fastvq.files import StrPath, exclusive, make_folder, whole, write_whole
from fastvq.modalities import plural
from fastvq.training import ranks

from .trained import TrainedModel, load

_FORMAT = 1
_BATCH = 100
_LARGEST_SHORT = 1 << 15
SHARD_FILES = 1000
"""Default number of files whose indices stand in one array."""


class _Known(Source):
    """A data set with a name, as a source: its examples by split and number."""

    def __init__(self, examples: Examples, rows: range | None = None) -> None:
        self.root = Path(examples.name)
        self._examples = examples
        self._rows = range(len(examples.train) + len(examples.test)) if rows is None else rows

    def stamp(self) -> list[tuple[str, int, int]]:
        return [(self._examples.fingerprint(), 0, 0)]

    def items(self) -> list[Item]:
        return [self._item(row) for row in self._rows]

    def parts(self, size: int) -> list[Source]:
        return [_Known(self._examples, self._rows[first : first + size]) for first in range(0, len(self._rows), size)]

    def read(self, format: Format, workers: int) -> Iterator[tuple[str, Tensor | str]]:
        for row in self._rows:
            split, number = self._place(row)
            yield self._item(row).name, getattr(self._examples, split)[number : number + 1]

    def _place(self, row: int) -> tuple[str, int]:
        learned = len(self._examples.train)
        return ("train", row) if row < learned else ("test", row - learned)

    def _item(self, row: int) -> Item:
        examples, (split, number) = self._examples, self._place(row)
        labels, captions = getattr(examples, f"{split}_labels"), getattr(examples, f"{split}_captions")
        names = examples.class_names
        class_name = None if labels is None or names is None else names[int(labels[number])]
        return Item(f"{split}/{number:06d}", class_name, captions[number] if captions is not None else None)


def tokenize(
    run: StrPath,
    data: StrPath,
    out: StrPath,
    *,
    shard_files: int = SHARD_FILES,
    skip_unreadable: bool = False,
    workers: int = 0,
    device: str = "cpu",
) -> list[str]:
    """Write the indices of all files of a data set as arrays; return lines to print.

    OUT gets, for each shard, `shard-000000.npy`, the indices (n, *grid) as int16 or int32, and `shard-000000.json` with
    the name, class and caption of each example; and `manifest.json`, which is complete when all are written. A shard
    appears as a whole. The same call continues what was interrupted: shards that are there and undamaged are kept.
    `fastvq.data.IndexShards` reads the folder.

    Called by several processes of torchrun, each writes its share of the shards; the files are the same as of one.

    Args:
        run: folder of the run whose model encodes.
        data: a name in `DATA_SETS`, all of whose examples are taken, or a folder or tar shards.
        out: the folder to write.
        shard_files: number of files in a shard; a tar file is one shard.
        skip_unreadable: leave out files that cannot be read, and name them in the manifest.
        workers: processes that read files.
        device: torch device of the model.

    Raises:
        CheckpointError, DataError: an invalid run; the data are missing or unreadable; OUT holds something else.
        ConfigError: an argument is out of range; the run has no bottleneck; OUT lies among the data.
    """
    for name, value, least in (("shard_files", shard_files, 1), ("workers", workers, 0)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    model = load(run, device=str(ranks.local_device(torch.device(device))) if device == "cuda" else device)
    if model.config.without_indices:
        raise ConfigError(f"{run} {model.config.without_indices}")
    check_outside(out, str(data), "out")
    source = _source(model, data)
    parts, out = source.parts(shard_files), Path(out)
    plan = _plan(model, source, len(parts), shard_files)
    if ranks.leads():
        _begin(out, plan)
    ranks.wait()
    own = range(distributed.rank(), len(parts), distributed.world_size())
    failures: dict[str, str] = {}
    with exclusive(out) if ranks.leads() else contextlib.nullcontext():
        with Progress(len(own), "shard", shown=ranks.leads()) as progress:
            for number in own:
                if _written(out, number, plan) is None:
                    keep = skip_unreadable
                    failures |= _write_shard(out, number, parts[number], model, plan, workers, skip_unreadable=keep)
                progress.update()
        failures = {name: reason for found in ranks.gathered_objects(failures) for name, reason in found.items()}
        files = sum(len(part.items()) for part in parts) if failures else 0
        report_failures(failures, files - len(failures), model.modality.reader, skip_unreadable=skip_unreadable)
        if not ranks.leads():
            return []
        return _finish(out, plan, model)


def _source(model: TrainedModel, data: StrPath) -> Source:
    """Return the files of a data set.

    Raises:
        DataError: it is of another modality or size than the run's examples.
    """
    if str(data) not in DATA_SETS and not Path(data).exists():
        raise DataError(f"{data} doesn't exist: data must be {describe_choices()}")
    if str(data) not in DATA_SETS:
        return open_source(data, model.modality.reader)
    known, config = DATA_SETS[str(data)], model.config
    if known.modality != config.modality or any(getattr(config, n) != v for n, v in known.settings.items()):
        shape = " x ".join(map(str, config.example_format.shape))
        raise DataError(
            f"data: {data} has {plural(known.modality)}, {known.form}; the run has {plural(config.modality)}, {shape}"
        )
    return _Known(known.load())


def _plan(model: TrainedModel, source: Source, shards: int, shard_files: int) -> dict[str, Any]:
    """Return what the manifest says before any shard is written: equal plans give equal files."""
    config = model.config
    sizes = model.vqvae.adapter.codebook_size
    stamp = json.dumps([source.stamp(), type(config.example_format).__name__, repr(config.example_format)])
    return {
        "format": _FORMAT,
        "model": fingerprint(model.vqvae).hex(),
        "data": hashlib.sha256(stamp.encode(errors="surrogateescape")).hexdigest(),
        "codebook_sizes": [sizes] if isinstance(sizes, int) else list(sizes),
        "grid": list(model.vqvae.adapter.index_shape(config.feature_grid)),
        "dtype": "int16" if np.max(sizes) <= _LARGEST_SHORT else "int32",
        "shard_files": shard_files,
        "shard_count": shards,
    }


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Write the manifest of a new folder, or check that the one there is of the same plan.

    Raises:
        DataError: the folder holds something else.
    """
    manifest = out / MANIFEST
    if manifest.exists() and not list(out.glob("shard-*")):
        manifest.unlink()  # of a call that ended before it wrote indices
    if manifest.exists():
        try:
            there = json.loads(manifest.read_bytes())
            changed = [name for name in plan if there.get(name) != plan[name]]
        except (ValueError, AttributeError) as error:
            raise DataError(f"{manifest} is damaged ({error}): choose another folder") from error
        if changed:
            raise DataError(f"{out} holds indices of other settings ({', '.join(changed)}): choose another folder")
        return
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise DataError(f"{out} holds other files: choose another folder")
    make_folder(out)
    write_whole(manifest, json.dumps(plan | {"complete": False, "shards": []}, indent=1) + "\n")


def _paths(out: Path, number: int) -> tuple[Path, Path]:
    return out / f"shard-{number:06d}.npy", out / f"shard-{number:06d}.json"


def _written(out: Path, number: int, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Return the description of a shard that is there and undamaged, or None."""
    array, description = _paths(out, number)
    try:
        described: dict[str, Any] = json.loads(description.read_bytes())
        same = described["model"] == plan["model"] and described["sha256"] == digest_of_file(array)
        return described if same and described["seal"] == seal_of(described) else None
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return None


def _write_shard(
    out: Path,
    number: int,
    part: Source,
    model: TrainedModel,
    plan: dict[str, Any],
    workers: int,
    *,
    skip_unreadable: bool,
) -> dict[str, str]:
    """Write the indices of some of the files; return why others of them cannot be read.

    Unless these are to be skipped, nothing is written then.
    """
    items = {item.name: item for item in part.items()}
    failures: dict[str, str] = {}
    names: list[str] = []
    owners: list[Item] = []
    encoded: list[Tensor] = []
    waiting: list[Tensor] = []

    def encode(least: int) -> None:
        while sum(map(len, waiting)) >= least and waiting:
            batch = torch.cat(waiting)
            waiting[:] = [batch[_BATCH:]] if len(batch) > _BATCH else []
            encoded.append(model.encode(to_float(batch[:_BATCH])).cpu())

    for name, result in part.read(model.config.example_format, workers):
        if isinstance(result, str):
            failures[name] = result
            continue
        names += numbered(name, len(result))
        owners += [items[name]] * len(result)
        waiting.append(result)
        encode(_BATCH)
    encode(1)
    if failures and not skip_unreadable:
        return failures
    nothing = np.empty((0, *plan["grid"]), plan["dtype"])
    indices = torch.cat(encoded).numpy().astype(plan["dtype"]) if encoded else nothing
    array, description = _paths(out, number)
    with whole(array) as file:
        np.save(file, indices)
    described = {
        "file": array.name,
        "model": plan["model"],
        "sha256": digest_of_file(array),
        "examples": len(names),
        "names": names,
        "class_names": [item.class_name for item in owners],
        "captions": [item.caption for item in owners],
        "failures": failures,
    }
    # Last: a shard is there when its description is.
    write_whole(description, json.dumps(described | {"seal": seal_of(described)}) + "\n")
    return failures


def _finish(out: Path, plan: dict[str, Any], model: TrainedModel) -> list[str]:
    """Write the complete manifest and return lines to print.

    Raises:
        DataError: a shard is missing, which another process was to write.
    """
    shards = []
    failed: dict[str, str] = {}
    for number in range(plan["shard_count"]):
        described = _written(out, number, plan)
        if described is None:
            raise DataError(f"{_paths(out, number)[0]} is missing: the same fastvq tokenize continues")
        failed |= described["failures"]
        shards.append({name: described[name] for name in ("file", "sha256", "examples", "seal")})
    total = sum(shard["examples"] for shard in shards)
    manifest = plan | {"complete": True, "examples": total, "failures": failed, "shards": shards}
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    skipped = f", {counted(len(failed), 'file')} skipped" if failed else ""
    grid = " x ".join(map(str, plan["grid"]))
    return [
        f"{counted(total, *model.modality.noun)} as {grid} indices each, in {counted(len(shards), 'shard')}{skipped}",
        f"manifest: {out / MANIFEST}",
    ]
