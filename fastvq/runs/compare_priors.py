"""Comparison of the kinds of priors after equal training time."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.coding import fingerprint
from fastvq.errors import ConfigError
from fastvq.files import StrPath, write_whole
from fastvq.models.priors import PRIORS
from fastvq.training.config import PRIOR_KINDS, PriorConfig
from fastvq.training.loop import usable_device
from fastvq.training.prior import IndexData, PriorTrainer

from .indices import run_indices

FIXED_SETTINGS = ("kind", "steps", "evaluate_every", "checkpoint_every")
"""Settings that a comparison chooses itself."""
_WARM_UP, _TIMED = 3, 12
_NEVER = 1 << 30


def compare_priors(
    run: StrPath,
    seconds: float,
    *,
    config: PriorConfig | None = None,
    data: StrPath | None = None,
    progress: bool = True,
) -> list[str] | None:
    """Train each kind of prior for equal time, write the results to RUN/priors.json and return the lines of a table.

    Returns None and writes nothing if interrupted: earlier results there stay until their successors are complete.

    Time is processor time of all threads, which is fairer than wall-clock time on a busy machine: a few steps of each
    kind are timed, and the kind gets as many steps as fit, under a schedule of that length. The run's own prior is
    left unchanged.

    Args:
        run: folder of a run whose VQ-VAE is trained.
        seconds: processor time for each kind.
        config: settings other than `FIXED_SETTINGS`; the device must be the CPU, whose time is measured.
        data: where the data set of the run is now, see `run_examples`.
        progress: show progress bars on stderr.

    Raises:
        CheckpointError, ConfigError, DataError: see `train_prior`; also an invalid time or a device
            other than the CPU.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds must be positive and finite, got {seconds}")
    if config is not None and config.text:
        raise ConfigError("text: kinds of priors are compared without captions")
    if config is not None and usable_device(config.device).type != "cpu":
        raise ConfigError(f"device must be 'cpu' where kinds are compared by processor time, got '{config.device}'")
    model, indices, codebook_size = run_indices(run, data)
    identity, vectors = fingerprint(model).hex(), model.adapter.code_vectors()
    records: list[dict[str, Any]] = []
    staged = not isinstance(codebook_size, int)
    for kind in PRIOR_KINDS:
        if PRIORS[kind].in_scales and indices.scales is None:
            continue
        if (PRIORS[kind].in_stages and not staged) or (kind == "pixelcnn" and staged):
            continue
        settings = dataclasses.replace(
            config or PriorConfig(),
            kind=kind,
            pattern=config.pattern if config is not None and kind == "transformer" else "flat",
            evaluate_every=_NEVER,
            checkpoint_every=_NEVER,
            steps=_WARM_UP + _TIMED,
        )
        record = _train_for(seconds, settings, indices, codebook_size, identity, vectors, progress=progress)
        if record is None:
            return None
        records.append(record)
    write_whole(Path(run) / "priors.json", json.dumps(records, indent=2) + "\n")
    rows = []
    for record in records:
        cells = (
            record["kind"],
            f"{record['bits_per_index']:.3f}",
            f"{record['parameters']:,}",
            f"{record['steps']}",
            f"{record['processor_seconds']:.0f}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    header = "| prior | bits per held-out index | parameters | steps | processor seconds |"
    return [header, "|---|---|---|---|---|", *rows]


def _train_for(
    seconds: float,
    config: PriorConfig,
    data: IndexData,
    codebook_size: int | tuple[int, ...],
    identity: str,
    vectors: Tensor | tuple[Tensor, ...] | None,
    *,
    progress: bool,
) -> dict[str, Any] | None:
    """Train one kind for about `seconds` of processor time; return its record, or None if interrupted."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:

        def trainer(config: PriorConfig, name: str) -> PriorTrainer:
            return PriorTrainer(config, data, codebook_size, Path(folder) / name, identity=identity, vectors=vectors)

        trial = trainer(config, "trial")
        trial.model.train()
        for _ in range(_WARM_UP):
            trial.train_step()
        started = time.process_time()
        for _ in range(_TIMED):
            trial.train_step()
        steps = max(1, round(seconds / max(1e-9, (time.process_time() - started) / _TIMED)))
        learner = trainer(dataclasses.replace(config, steps=steps), "run")
        started = time.process_time()
        bits = learner.fit(progress=progress)
        spent = time.process_time() - started
    if bits is None:
        return None
    return {
        "kind": config.kind,
        "bits_per_index": bits,
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
        "steps": steps,
        "processor_seconds": round(spent, 1),
    }
