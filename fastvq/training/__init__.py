"""Training a VQ-VAE: settings, data order, checkpoints, metrics, evaluation and the loop that joins them."""

from __future__ import annotations

from fastvq.errors import CheckpointError, ConfigError

from .build import build_model, load_images
from .config import TrainConfig
from .evaluation import Evaluation, evaluate, psnr_db
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Evaluation",
    "TrainConfig",
    "Trainer",
    "build_model",
    "evaluate",
    "load_images",
    "psnr_db",
]
