"""The runs in a folder, each with its figures."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from fastvq.coding.container import fingerprint_of
from fastvq.data.registry import name_of
from fastvq.errors import CheckpointError, FastvqError, aligned, first_line
from fastvq.files import StrPath
from fastvq.modalities import modality_of
from fastvq.training.checkpoint import checkpoint_folders, load_latest
from fastvq.training.config import PriorConfig

from .load import PRIOR_FOLDER
from .run_page import latest_record

_COLUMNS = ("run", "data", "bottleneck", "steps", "quality", "perplexity", "prior bits", "size", "date")


def list_runs(root: StrPath) -> list[dict[str, Any]]:
    """Return a record for each run in a folder and its subfolders, by name; runs within runs are left out.

    Each has the keys run, path, modality, data, bottleneck, step, steps, seconds, measure (of reconstructions, such as
    "psnr_db"), value (of it), perplexity, prior_bits, bytes and date; what is not known is None. A run that cannot be
    read has only run, path and error.

    Raises:
        CheckpointError: there is no such folder, or no run in it.
    """
    root = Path(root)
    if not root.is_dir():
        fault = "is not a folder" if root.exists() else "does not exist"
        raise CheckpointError(f"{root} {fault}: give a folder of runs")
    found = []
    for folder, subfolders, _ in os.walk(root):
        if checkpoint_folders(folder):
            found.append(Path(folder))
            subfolders.clear()
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    if not found:
        raise CheckpointError(f"{root} holds no run: fastvq train --out {root / 'mine'} makes one")
    return [_record(folder, root) for folder in found]


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the records of runs as lines in columns; those that cannot be read below, with the reason."""
    rows = [_row(record) for record in records if "error" not in record]
    lines = aligned([_COLUMNS, *rows], right=range(3, 8)) if rows else []
    failed = [f"{record['run']}: {record['error']}" for record in records if "error" in record]
    return [*lines, *([""] if lines and failed else []), *failed]


def _record(folder: Path, root: Path) -> dict[str, Any]:
    name = folder.name if folder == root else folder.relative_to(root).as_posix()
    about = {"run": name or str(folder), "path": str(folder)}
    try:
        checkpoint = load_latest(folder, tensors=False)
        latest = latest_record(folder)
        bits = _prior_bits(folder)
    except (FastvqError, OSError) as error:
        return about | {"error": first_line(error)}
    config = checkpoint.config
    assert checkpoint.folder is not None
    saved = datetime.fromtimestamp((checkpoint.folder / "checkpoint.json").stat().st_mtime)
    return about | {
        "modality": config.modality,
        "data": name_of(config.data),
        "bottleneck": config.bottleneck,
        "step": checkpoint.step,
        "steps": config.steps,
        "seconds": checkpoint.seconds,
        **_quality(latest, config.modality),
        "perplexity": latest.get("perplexity"),
        "prior_bits": bits,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "date": saved.isoformat(timespec="seconds"),
    }


def _prior_bits(folder: Path) -> float | None:
    """Return the bits per index of a run's prior; None if there is none, or the model has changed since."""
    prior = folder / PRIOR_FOLDER
    if not checkpoint_folders(prior):
        return None
    learned_from = load_latest(prior, PriorConfig, tensors=False).data_fingerprint
    if learned_from != fingerprint_of(load_latest(folder).trained()).hex():
        return None
    bits: float | None = latest_record(prior).get("bits_per_index")
    return bits


def _quality(latest: dict[str, Any], modality: str) -> dict[str, Any]:
    """Return the measure of reconstructions in a record of an evaluation, and its value."""
    found = [name for name in modality_of(modality).measures if latest.get(name) is not None]
    return {"measure": found[0], "value": latest[found[0]]} if found else {"measure": None, "value": None}


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    name = record["measure"]
    quality = "" if name is None else modality_of(record["modality"]).measures[name].text(record["value"])
    return (
        record["run"],
        record["data"],
        record["bottleneck"],
        f"{record['step']}/{record['steps']}",
        quality,
        _decimals(record["perplexity"], 0),
        _decimals(record["prior_bits"], 2),
        f"{record['bytes'] / 1e6:.1f} MB",
        record["date"].replace("T", " ")[:16],
    )


def _decimals(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"
