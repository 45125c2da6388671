"""Training of a run's prior, on the indices of the run's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq import VectorQuantize
from fastvq.coding import fingerprint
from fastvq.errors import ConfigError
from fastvq.models import VQVAE, Prior
from fastvq.training.checkpoint import checkpoint_folders, load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.loop import delete_run, usable_device
from fastvq.training.prior import IndexData, PriorTrainer

from .indices import delete_indices, run_indices
from .load import PRIOR_FOLDER, load_prior_checkpoint


class TrainedPrior(NamedTuple):
    """Result of `train_prior`.

    Attributes:
        prior: the prior, in eval mode and on the CPU.
        data: the indices that it learned from and was evaluated on.
        bits_per_index: mean of -log2 p over the held-out indices.
    """

    prior: Prior
    data: IndexData
    bits_per_index: float


def train_prior(
    run: Path, config: PriorConfig | None = None, *, resume: bool = False, progress: bool = True
) -> TrainedPrior | None:
    """Train a prior on the indices of a run's images; return None, with the state saved, if interrupted.

    Args:
        run: folder of a run whose VQ-VAE is trained.
        config: settings; a resumed training keeps its own.
        resume: continue the training in RUN/prior/ if it has a checkpoint. Otherwise an earlier prior there is
            replaced, after the settings have been validated.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: the run has no checkpoint; `resume` and the prior belongs to another model or is damaged.
        ConfigError: invalid settings, or a run without a bottleneck.
        FloatingPointError: the loss is not finite.
    """
    model, data, codebook_size = run_indices(run)
    folder = run / PRIOR_FOLDER
    resume = resume and bool(checkpoint_folders(folder))
    config = load_prior_checkpoint(run, model).config if resume else config or PriorConfig()
    device = usable_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = PriorTrainer(
            config,
            data,
            codebook_size,
            folder,
            identity=fingerprint(model).hex(),
            vectors=codebook_of(model),
            resume=resume,
            replace=not resume,
        )
        bits = trainer.fit(progress=progress)
    return None if bits is None else TrainedPrior(trainer.model.eval().cpu(), data, bits)


def check_resumed(run: Path, given: dict[str, Any]) -> None:
    """Raise a ConfigError if a given setting differs from that of the prior to be resumed."""
    if checkpoint_folders(run / PRIOR_FOLDER):
        own = load_latest(run / PRIOR_FOLDER, PriorConfig).config
        pairs = [(name, getattr(own, name), value) for name, value in given.items()]
        changed = [f"{name} {kept}, not {value}" for name, kept, value in pairs if kept != value]
        if changed:
            raise ConfigError(f"a resumed prior keeps its settings: {', '.join(changed)}")


def codebook_of(model: VQVAE) -> Tensor | None:
    """Return the codebook (K, D) of a model, or None unless it has exactly one."""
    return model.bottleneck.codebook if isinstance(model.bottleneck, VectorQuantize) else None


def delete_prior(run: Path) -> None:
    """Delete a run's prior and its indices, and nothing else."""
    delete_run(run / PRIOR_FOLDER)
    delete_indices(run)
