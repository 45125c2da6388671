"""Tiny settings, folders of images, and commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from fastvq.training.checkpoint import checkpoint_folders
from fastvq.training.metrics import read_metrics

TINY = [
    "--codebook-size=16", "--dim=8", "--width=8", "--residual-width=4", "--encoder-blocks=1", "--decoder-blocks=1",
    "--batch-size=8", "--warmup-steps=2", "--log-every=2",
]  # fmt: skip


PATIENCE_S = 120


def folder_of_images(root: Path) -> Path:
    random = np.random.default_rng(0)
    root.mkdir()
    for n in range(40):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(root / f"{n:02d}.png")
    return root


def start_training(run: Path, images: Path, *, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastvq", "train", f"--out={run}", f"--data={images}", "--image-size=16"]
    return start([*command, *TINY, f"--steps={steps}", "--evaluate-every=1000000", "--checkpoint-every=10"])


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a process with one thread: two on cores that others use as well spend their time waiting."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_record(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return when metrics.jsonl holds a record of `step` or later."""
    deadline = time.monotonic() + PATIENCE_S
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or all(record["step"] < step for record in read_metrics(metrics)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no record of step {step}"
        os.sched_yield()


def final_state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folders(run)[-1] / "state.safetensors")
