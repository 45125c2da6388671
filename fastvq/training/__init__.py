"""Training of a VQ-VAE and of a prior over its indices.

config.py       settings of the prior    config_file.py  settings in TOML
loop.py         steps, records, resume   checkpoint.py   state on disk, whole or absent
trainer.py      the VQ-VAE               metrics.py      metrics.jsonl and TensorBoard
prior.py        the prior                interrupt.py    Ctrl-C between two steps
contrastive.py  images and captions
build.py        data set and model       evaluation.py   quality, perplexity and usage on held-out examples
ranks.py        several processes        adversary.py    the discriminator of an adversarial loss
loggers.py      TensorBoard, wandb, CSV  perceptual.py   the distance between features
plan.py         sizes without training   feature_network.py  the network of these features

The settings of the VQ-VAE are those of its modality, in `fastvq.modalities`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvq.errors import CheckpointError, ConfigError
from fastvq.extras import lazy_attributes
from fastvq.modalities import TrainConfig

from .config import ContrastiveConfig, PriorConfig

# Settings are read without torch: the command line makes its options of them.
if TYPE_CHECKING:
    from .build import build_model, load_examples
    from .contrastive import ContrastiveTrainer
    from .evaluation import Evaluation, evaluate
    from .prior import IndexData, PriorTrainer, bits_per_index
    from .trainer import Trainer
else:
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "build": ("build_model", "load_examples"),
            "contrastive": ("ContrastiveTrainer",),
            "evaluation": ("Evaluation", "evaluate"),
            "prior": ("IndexData", "PriorTrainer", "bits_per_index"),
            "trainer": ("Trainer",),
        },
    )

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "Evaluation",
    "IndexData",
    "PriorConfig",
    "PriorTrainer",
    "TrainConfig",
    "Trainer",
    "bits_per_index",
    "build_model",
    "evaluate",
    "load_examples",
]
