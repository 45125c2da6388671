"""Loading of the trained models of a run: its VQ-VAE and its prior."""

from __future__ import annotations

from pathlib import Path

from fastvq.coding import fingerprint
from fastvq.errors import CheckpointError
from fastvq.models import VQVAE, Prior
from fastvq.training.build import build_model
from fastvq.training.checkpoint import Checkpoint, checkpoint_folders, load_latest
from fastvq.training.config import PriorConfig, TrainConfig
from fastvq.training.prior import build_prior

PRIOR_FOLDER = "prior"
"""Subfolder of a run that holds its prior and the indices that the prior learned from."""


def load_model(run: Path) -> tuple[VQVAE, TrainConfig]:
    """Return the model of the latest checkpoint in a run's folder, in eval mode, and its settings.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
    """
    checkpoint = load_latest(run)
    model = build_model(checkpoint.config)
    model.load_state_dict(checkpoint.part("model"))
    return model.eval(), checkpoint.config


def load_prior(run: Path) -> tuple[Prior, VQVAE]:
    """Return the trained prior of a run, in eval mode, and the model of its indices, both on the CPU.

    Raises:
        CheckpointError: the run has no prior, the prior is damaged, or it belongs to another model.
    """
    model, _ = load_model(run)
    checkpoint = load_prior_checkpoint(run, model)
    prior = build_prior(checkpoint.built_from["kind"], **checkpoint.built_from["settings"])
    prior.load_state_dict(checkpoint.part("model"))
    return prior.eval(), model


def load_prior_checkpoint(run: Path, model: VQVAE) -> Checkpoint:
    """Return the latest checkpoint of a run's prior.

    Raises:
        CheckpointError: the run has no prior, the prior is damaged, or it belongs to another model.
    """
    folder = run / PRIOR_FOLDER
    if not checkpoint_folders(folder):
        raise CheckpointError(f"{run} has no prior yet: fastvq prior {run} learns one")
    checkpoint = load_latest(folder, PriorConfig)
    if checkpoint.data_fingerprint != fingerprint(model).hex():
        raise CheckpointError(f"{folder} holds the prior of another model: train it again without --resume")
    return checkpoint
