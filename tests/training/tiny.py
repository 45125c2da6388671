"""Settings and images of a run of a few seconds, and its interruption."""

from __future__ import annotations

import os
import signal

import torch

from fastvq.data import Examples
from fastvq.modalities import ImageConfig
from fastvq.training import Trainer

# 392 vectors a batch for 16 codes: with this threshold some code is replaced at random in nearly every step.
TINY = ImageConfig(
    codebook_size=16, dim=8, dead_code_threshold=20, width=8, residual_width=4, encoder_blocks=1, decoder_blocks=1,
    steps=12, batch_size=8, warmup_steps=2, log_every=2, evaluate_every=6, checkpoint_every=4,
)  # fmt: skip


def tiny_images(seed: int = 0) -> Examples:
    """Return 40 training images and 20 held-out ones of noise."""
    pixels = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Examples("noise", pixels[:40], pixels[40:], tuple(f"image {n}" for n in range(20)))


def stop_after(trainer: Trainer, steps: int) -> None:
    """Train, and send this process the signal of Ctrl-C in step number `steps`."""
    original = trainer.train_step

    def step_and_interrupt() -> None:
        original()
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.train_step = step_and_interrupt
    assert trainer.fit(progress=False) is None
    assert trainer.step == steps
