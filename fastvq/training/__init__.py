"""Training a VQ-VAE: settings, data order, checkpoints, metrics, evaluation and the loop that joins them."""

from __future__ import annotations

from fastvq.training.build import build_model, load_images, load_model
from fastvq.training.checkpoint import CheckpointError
from fastvq.training.config import ConfigError, TrainConfig
from fastvq.training.evaluation import Evaluation, evaluate, psnr_db
from fastvq.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Evaluation",
    "TrainConfig",
    "Trainer",
    "build_model",
    "evaluate",
    "load_images",
    "load_model",
    "psnr_db",
]
