"""Parts of demos: their announcement, settings with fewer steps, and the training of a model and its prior."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

import fastvq
from fastvq.data import Examples
from fastvq.files import StrPath
from fastvq.modalities import TrainConfig
from fastvq.modalities.settings import Settings
from fastvq.runs.pictures import failures_as_warnings, picture_prior, picture_reconstructions, picture_run
from fastvq.runs.train_prior import TrainedPrior, train_prior
from fastvq.training.config import PriorConfig
from fastvq.training.evaluation import Evaluation
from fastvq.training.trainer import Trainer

SettingsT = TypeVar("SettingsT", bound=Settings)


def announce(parts: Sequence[tuple[str, int]], part: int) -> None:
    """Print number and description of a part that begins.

    Args:
        parts: description of each part, and its approximate time in seconds on 2 idle cores.
        part: number of the part, from 1.
    """
    description, seconds = parts[part - 1]
    print(f"\n[{part}/{len(parts)}] {description}: about {seconds} s on 2 idle cores", flush=True)


def with_steps(config: SettingsT, steps: int | None) -> SettingsT:
    """Return settings with another number of training steps, if one is given."""
    return config if steps is None else dataclasses.replace(config, steps=steps)


class TrainedParts(NamedTuple):
    """Result of `train_model_and_prior`."""

    trainer: Trainer
    evaluation: Evaluation
    prior: TrainedPrior
    prior_steps: int

    def facts(self) -> dict[str, Any]:
        """Return steps and seconds of the trainings, threads and versions."""
        return {
            "steps": self.trainer.step,
            "seconds": round(self.trainer.seconds, 1),
            "prior_steps": self.prior_steps,
            "threads": torch.get_num_threads(),
            "versions": {"fastvq": fastvq.__version__, "torch": torch.__version__},
        }


def train_model_and_prior(
    parts: Sequence[tuple[str, int]],
    folder: StrPath,
    examples: Examples,
    config: TrainConfig,
    prior_config: PriorConfig,
    *,
    resume: bool,
) -> TrainedParts | None:
    """Run the first two parts of a demo and draw their pictures; return None, with the state saved, if interrupted.

    Args:
        parts: see `announce`.
        folder: the folder of the demo.
        examples: the data set.
        config, prior_config: settings of the model and of its prior.
        resume: continue the trainings that are there.
    """
    announce(parts, 1)

    def draw(trainer: Trainer, evaluation: Evaluation) -> None:
        with failures_as_warnings("picture of reconstructions"):
            picture_reconstructions(trainer, evaluation, captioned=False)

    trainer = Trainer(config, examples, folder, resume=resume)
    evaluation = trainer.fit(on_evaluation=draw)
    if evaluation is None:
        return None
    picture_run(trainer, evaluation, captioned=False)

    announce(parts, 2)
    prior = train_prior(folder, prior_config, resume=resume)
    if prior is None:
        return None
    with failures_as_warnings("picture of curves of the prior"):
        picture_prior(folder, captioned=False)
    return TrainedParts(trainer, evaluation, prior, prior_config.steps)
