"""Load the trained model of a run."""

from __future__ import annotations

from pathlib import Path

from fastvq.models import VQVAE
from fastvq.training.build import build_model
from fastvq.training.checkpoint import load_latest
from fastvq.training.config import TrainConfig


def load_model(run: Path) -> tuple[VQVAE, TrainConfig]:
    """Return the model of the latest checkpoint in a run's folder, in eval mode, and its settings.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint = load_latest(run)
    model = build_model(checkpoint.config)
    model.load_state_dict(checkpoint.part("model"))
    return model.eval(), checkpoint.config
