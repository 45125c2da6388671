"""Trainings on several ranks, for test_ranks.py, which starts `together.py SCENARIO FOLDER` on each."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from fastvq import distributed
from fastvq.runs import encode, evaluate
from fastvq.training import PriorConfig, Trainer, ranks
from fastvq.training.prior import IndexData, PriorTrainer
from tests.training.tiny import TINY, tiny_images

# The discriminator, and the sums of further losses, are shared as well.
VQVAE = dataclasses.replace(
    TINY, adversarial_weight=0.8, adversarial_start=2, discriminator_width=8, perceptual_weight=0.1
)
PRIOR = PriorConfig(
    dim=16, depth=1, heads=2, steps=8, batch_size=4, warmup_steps=1, log_every=4, evaluate_every=4, checkpoint_every=4
)


def prior_trainer(folder: Path, *, resume: bool = False) -> PriorTrainer:
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(0, 9, (30, 3, 3), generator=generator)
    data = IndexData(indices[:20], indices[20:], torch.arange(20) % 2, torch.arange(10) % 2, ("a", "b"))
    return PriorTrainer(PRIOR, data, 9, folder, identity="x", resume=resume)


def whole(folder: Path) -> None:
    """Train without an interruption."""
    assert Trainer(VQVAE, tiny_images(), folder / "vqvae").fit(progress=False)
    assert prior_trainer(folder / "prior").fit(progress=False)


def stopped(folder: Path) -> None:
    """Stop both trainings after a signal to the last rank alone."""

    def prior() -> PriorTrainer:
        return prior_trainer(folder / "prior")

    for train, steps in ((lambda: Trainer(VQVAE, tiny_images(), folder / "vqvae"), 7), (prior, 5)):
        trainer = train()
        original = trainer.learn

        def learn(trainer=trainer, original=original, steps=steps) -> None:
            original()
            if trainer.step + 1 == steps and distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGINT)

        trainer.learn = learn
        assert trainer.fit(progress=False) is None
        assert trainer.step == steps
        distributed.check_synchronized(trainer.model)


def both(folder: Path) -> None:
    """Train without an interruption, and with one."""
    whole(folder / "whole")
    stopped(folder / "stopped")


def resumed(folder: Path) -> None:
    """Go on from there."""
    torch.rand(1000)
    assert Trainer(VQVAE, tiny_images(), folder / "vqvae", resume=True).fit(progress=False)
    assert prior_trainer(folder / "prior", resume=True).fit(progress=False)


def killed(folder: Path) -> None:
    """Kill rank 1 in its sixth step."""
    trainer = Trainer(VQVAE, tiny_images(), folder / "vqvae")
    original = trainer.learn

    def learn() -> None:
        if trainer.step == 5 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        original()

    trainer.learn = learn
    trainer.fit(progress=False)


def measured(folder: Path) -> None:
    """Evaluate and encode the run in a folder on its images, in batches of seven."""
    evaluate._BATCH = encode._BATCH = 7
    evaluate.evaluate_run(folder / "run", folder / "two.json", data=folder / "images")
    encode.encode_files(folder / "run", folder / "images", folder / "two.fvq", model="prior")


if __name__ == "__main__":
    with ranks.process_group():
        globals()[sys.argv[1]](Path(sys.argv[2]))
