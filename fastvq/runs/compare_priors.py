"""The three kinds of priors beside each other, after equal time."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastvq.coding import fingerprint
from fastvq.errors import ConfigError
from fastvq.files import whole
from fastvq.models.priors import PRIORS
from fastvq.training.loop import usable_device
from fastvq.training.prior import PriorConfig, PriorTrainer, codebook_of, codes_of

DECIDED = ("kind", "steps", "evaluate_every", "checkpoint_every")
"""Settings that a comparison has its own values for."""
_WARM_UP, _TIMED = 3, 12
_LONG = 1 << 30


def compare_priors(run: Path, seconds: float, *, config: PriorConfig | None = None, progress: bool = True) -> list[str]:
    """Train each kind of prior for so long and write what came of it to RUN/priors.json; return the lines of a table.

    Equal time is processor time, of all threads: each kind gets as many steps as fit, by the time of some steps before,
    under a schedule of that length. On a busy machine that is fairer than the clock. The run's own prior stays.

    Args:
        run: folder of a run whose VQ-VAE is trained.
        seconds: of processor time, for each kind.
        config: settings besides those of `DECIDED`; the device is the CPU, whose time is measured.

    Raises:
        CheckpointError, ConfigError: see `train_prior`; no such time, or another device.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds must be positive and finite, got {seconds}")
    if config is not None and usable_device(config.device).type != "cpu":
        raise ConfigError(f"device must be 'cpu' where kinds are compared by processor time, got '{config.device}'")
    model, codes, codebook_size = codes_of(run)
    identity, vectors = fingerprint(model).hex(), codebook_of(model)
    records: list[dict[str, Any]] = []
    for kind in PRIORS:
        settings = dataclasses.replace(
            config or PriorConfig(), kind=kind, evaluate_every=_LONG, checkpoint_every=_LONG, steps=_WARM_UP + _TIMED
        )
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:

            def trainer(of: PriorConfig, name: str, folder: str = folder) -> PriorTrainer:
                return PriorTrainer(of, codes, codebook_size, Path(folder) / name, identity=identity, vectors=vectors)

            trial = trainer(settings, "trial")
            trial.model.train()
            for _ in range(_WARM_UP):
                trial.train_step()
            started = time.process_time()
            for _ in range(_TIMED):
                trial.train_step()
            steps = max(1, round(seconds / max(1e-9, (time.process_time() - started) / _TIMED)))
            learner = trainer(dataclasses.replace(settings, steps=steps), "run")
            started = time.process_time()
            if not learner.fit(progress=progress):
                break
            spent = time.process_time() - started
        records.append(
            {
                "kind": kind,
                "bits_per_index": learner.evaluate()[0],
                "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
                "steps": steps,
                "processor_seconds": round(spent, 1),
            }
        )
    with whole(run / "priors.json") as partial:
        partial.write_text(json.dumps(records, indent=2) + "\n")
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
    return ["| prior | held-out bits a code | parameters | steps | processor seconds |", "|---|---|---|---|---|", *rows]
