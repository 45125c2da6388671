"""A run's contrastive model of images and captions: its training, and the order that it gives samples of a text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.coding import fingerprint
from fastvq.data.examples import to_float
from fastvq.errors import CheckpointError, ConfigError
from fastvq.extras import tracked
from fastvq.files import StrPath, exclusive
from fastvq.models import VQVAE, ContrastiveModel, TextTokenizer
from fastvq.training.checkpoint import Checkpoint, checkpoint_folders, damage_named, load_latest
from fastvq.training.config import ContrastiveConfig
from fastvq.training.contrastive import ContrastiveTrainer
from fastvq.training.loop import usable_device

from .load import built, load_model, run_examples, warn_of_unfinished

CONTRASTIVE_FOLDER = "contrastive"
"""Subfolder of a run that holds its contrastive model."""
_BATCH = 250


class TrainedContrastive(NamedTuple):
    """Result of `train_contrastive`.

    Attributes:
        model: the model, in eval mode and on the CPU.
        retrieval: share of held-out images whose caption is the nearest of `candidates`.
        candidates: number of held-out captions among which it is looked for.
    """

    model: ContrastiveModel
    retrieval: float
    candidates: int


def train_contrastive(
    run: StrPath,
    config: ContrastiveConfig | None = None,
    *,
    folder: StrPath | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data: StrPath | None = None,
    logger: str | None = None,
    progress: bool = True,
) -> TrainedContrastive | None:
    """Train a contrastive model of a run's images and captions; return None, with the state saved, if interrupted.

    Args:
        run: folder of a run of images whose VQ-VAE is trained.
        config: settings; by default the defaults, or those of the training that is resumed.
        folder: where the model is saved, RUN/contrastive by default, from which samples are ranked.
        resume: continue the training that is there.
        overwrite: delete the model that is there.
        data: where the data set of the run is now, see `run_examples`.
        logger: see `Loop.fit`.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: the run has no checkpoint; it has such a model, and neither `resume` nor `overwrite` is given;
            `resume` and the model belongs to another VQ-VAE or is damaged; another process is training it.
        ConfigError: invalid settings, data without captions, or a run of another modality.
        DataError: the data are missing, or differ from those that the run was trained on.
        FloatingPointError: the loss is not finite.
    """
    target = Path(run) / CONTRASTIVE_FOLDER if folder is None else Path(folder)
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other")
    if checkpoint_folders(target) and not resume and not overwrite:
        raise CheckpointError(
            f"{run} has a contrastive model already ({target}): resume it (--resume), or replace it (--overwrite)"
        )
    vqvae, settings = load_model(run)
    if settings.modality != "image":
        raise ConfigError(f"{run} is of the modality {settings.modality}: a contrastive model is one of images")
    examples = run_examples(run, data)
    if not any(examples.train_captions or ()):
        raise ConfigError(
            f"the data of {run} have no captions to learn from: a folder has them in captions.jsonl, or in a .txt file"
            " beside each image"
        )
    resume = resume and bool(checkpoint_folders(target))
    latest = load_latest(target, ContrastiveConfig) if resume else None
    config = config or (ContrastiveConfig() if latest is None else latest.config)
    tokenizer = (
        TextTokenizer.train(examples.train_captions or (), vocabulary=config.text_vocabulary, length=config.text_length)
        if latest is None
        else TextTokenizer(latest.built_from["tokenizer"])
    )
    with torch.no_grad():
        shown = tracked(examples.train.split(_BATCH), len(examples.train), "image", count=len, shown=progress)
        decoded = torch.cat([_stored(vqvae.reconstruct(to_float(part))) for part in shown])
    device = usable_device(config.device)
    with exclusive(target), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = ContrastiveTrainer(
            config,
            examples,
            decoded,
            target,
            tokenizer=tokenizer,
            identity=fingerprint(vqvae).hex(),
            mirrored=settings.mirrored,
            resume=resume,
            replace=overwrite,
        )
        found = trainer.fit(logger=logger, progress=progress)
    return None if found is None else TrainedContrastive(trainer.model.eval().cpu(), found, trainer.candidates)


def _stored(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def resumed_contrastive(run: StrPath) -> Checkpoint | None:
    """Return the checkpoint, without its tensors, that `train_contrastive` would resume, or None if there is none."""
    folder = Path(run) / CONTRASTIVE_FOLDER
    return load_latest(folder, ContrastiveConfig, tensors=False) if checkpoint_folders(folder) else None


def load_contrastive(run: StrPath, vqvae: VQVAE) -> ContrastiveModel:
    """Return the contrastive model of a run whose VQ-VAE is loaded, in eval mode and on the CPU.

    A RuntimeWarning says so if it is unfinished.

    Raises:
        CheckpointError: the run has none, or it is damaged or belongs to another VQ-VAE.
    """
    folder = Path(run) / CONTRASTIVE_FOLDER
    if not checkpoint_folders(folder):
        raise CheckpointError(f"{run} has no contrastive model yet: fastvq contrast {run} learns one")
    checkpoint = load_latest(folder, ContrastiveConfig)
    if checkpoint.data_fingerprint != fingerprint(vqvae).hex():
        raise CheckpointError(f"{folder} belongs to another VQ-VAE: train it again with --overwrite")
    warn_of_unfinished(folder, checkpoint, f"fastvq contrast {run} --resume")
    with damage_named(checkpoint.folder):
        model = built(lambda: ContrastiveModel(**checkpoint.built_from["settings"]), checkpoint)
        model.tokenizer = TextTokenizer(checkpoint.built_from["tokenizer"])
    return model.eval()


def check_text(text: str | None, *, label: int | str | None, rerank: int | None, count: int) -> None:
    """Validate the arguments of samples that follow a text.

    Raises:
        ConfigError: arguments that exclude each other, or too few samples to rank.
    """
    if text is not None and label is not None:
        raise ConfigError(f"text and label exclude each other, got {text!r} and {label!r}")
    if rerank is None:
        return
    if text is None:
        raise ConfigError(f"rerank: orders samples by their similarity to a text, got {rerank} without")
    if rerank < count:
        raise ConfigError(f"rerank must be at least the number of samples that are kept, {count}, got {rerank}")


@torch.no_grad()
def similarity(model: ContrastiveModel, images: Tensor, text: str) -> Tensor:
    """Return the similarity (B,) in [-1, 1] of images (B, C, H, W) in [0, 1] and a text.

    Raises:
        ConfigError: the text is empty or too long.
    """
    assert model.tokenizer is not None
    row = model.tokenizer.encode(text).to(images.device)
    return torch.cat([model(part, row[None])[:, 0] for part in images.split(_BATCH)])
