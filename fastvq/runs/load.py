"""Loading of the trained models of a run: its VQ-VAE and its prior."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastvq.coding import fingerprint
from fastvq.data import DATA_SETS, Examples
from fastvq.errors import CheckpointError, ConfigError, DataError
from fastvq.files import StrPath
from fastvq.modalities import TrainConfig
from fastvq.models import VQVAE, Continuous, Prior, TextPrior, TextTokenizer
from fastvq.training.build import build_model, load_examples
from fastvq.training.checkpoint import Checkpoint, checkpoint_folders, damage_named, load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.prior import build_prior

PRIOR_FOLDER = "prior"
"""Subfolder of a run that holds its prior and the indices that the prior learned from."""
SUCCESSOR_FOLDER = "successor"
"""Subfolder of that one in which the successor of a prior is trained; it takes its place when it is finished."""

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_model(run: StrPath) -> tuple[VQVAE, TrainConfig]:
    """Return the model of the latest checkpoint in a run's folder, in eval mode, and its settings.

    A RuntimeWarning says so if the training is unfinished.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
    """
    checkpoint = load_latest(run)
    warn_of_unfinished(run, checkpoint, f"fastvq train --out {run} --resume")
    return checkpoint_model(checkpoint), checkpoint.config


def checkpoint_model(checkpoint: Checkpoint) -> VQVAE:
    """Return the model of a checkpoint, in eval mode.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    with damage_named(checkpoint.folder):
        return built(lambda: build_model(checkpoint.config), checkpoint).eval()


def run_examples(run: StrPath, data: StrPath | None = None) -> Examples:
    """Return the data set that a run was trained on.

    Files that cannot be read are left out with a `SkippedFilesWarning`: the fingerprint tells whether one is missing.

    Args:
        run: folder of the run.
        data: where the data set is now: a name in `DATA_SETS` or a folder; by default where it was.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
        DataError: the data are missing, or differ from those that the run was trained on.
    """
    checkpoint = load_latest(run)
    config = dataclasses.replace(checkpoint.config, skip_unreadable=True)
    if data is not None:
        config = dataclasses.replace(config, data=str(data) if str(data) in DATA_SETS else str(Path(data).resolve()))
    try:
        examples = load_examples(config)
    except DataError as error:
        moved = "" if data is not None else f" (if the data of {run} have moved, --data says where they are)"
        raise DataError(f"{error}{moved}") from error
    if (own := examples.fingerprint()) != checkpoint.data_fingerprint:
        raise DataError(
            f"the data differ from those that {run} was trained on: {config.data} has the fingerprint {own},"
            f" {checkpoint.config.data} had {checkpoint.data_fingerprint}"
        )
    return examples


def load_prior(run: StrPath) -> tuple[Prior, VQVAE]:
    """Return the trained prior of a run, in eval mode, and the model of its indices, both on the CPU.

    A RuntimeWarning says so if one of them is unfinished.

    Raises:
        CheckpointError: the run has no prior, the prior is damaged, or it belongs to another model.
    """
    model, _ = load_model(run)
    return load_prior_of(run, model), model


def load_prior_of(run: StrPath, model: VQVAE) -> Prior:
    """Return the trained prior of a run whose model is loaded, like `load_prior`."""
    checkpoint = load_prior_checkpoint(run, model)
    warn_of_unfinished(Path(run) / PRIOR_FOLDER, checkpoint, f"fastvq prior {run} --resume")
    with damage_named(checkpoint.folder):
        built_from = checkpoint.built_from
        prior = built(lambda: build_prior(built_from["kind"], **built_from["settings"]), checkpoint)
        prior.class_names = tuple(built_from.get("class_names", ()))
        if isinstance(prior, TextPrior):
            prior.tokenizer = TextTokenizer(built_from["tokenizer"])
    return prior.eval()


def load_prior_checkpoint(run: StrPath, model: VQVAE) -> Checkpoint:
    """Return the latest checkpoint of a run's prior.

    Raises:
        CheckpointError: the run has no prior, the prior is damaged, or it belongs to another model.
    """
    folder = Path(run) / PRIOR_FOLDER
    # Between the deletion of a prior and the move of its finished successor, only the latter exists.
    if not checkpoint_folders(folder) and successor_is_finished(folder):
        folder = folder / SUCCESSOR_FOLDER
    if not checkpoint_folders(folder):
        if isinstance(model.bottleneck, Continuous):
            raise CheckpointError(f"{run} was trained with a bottleneck that has no indices, so it has no prior")
        raise CheckpointError(f"{run} has no prior yet: fastvq prior {run} learns one")
    checkpoint = load_latest(folder, PriorConfig)
    if checkpoint.data_fingerprint != fingerprint(model).hex():
        raise CheckpointError(f"{folder} holds the prior of another model: train it again with --overwrite")
    return checkpoint


def label_number(prior: Prior, label: int | str | None) -> int | None:
    """Return the number of a class that is given by number or by name.

    Raises:
        ConfigError: the prior has no such class.
    """
    if label is None:
        return None
    if not prior.classes:
        instead = " with captions: give a text instead" if isinstance(prior, TextPrior) else " without classes"
        raise ConfigError(f"label: this prior was trained{instead}, got {label}")
    if label in prior.class_names:
        return prior.class_names.index(str(label))
    number = int(label) if not isinstance(label, str) or label.lstrip("-").isdecimal() else -1
    if not 0 <= number < prior.classes:
        names = f" or one of {', '.join(prior.class_names)}" if prior.class_names else ""
        raise ConfigError(f"label must be between 0 and {prior.classes - 1}{names}, got {label}")
    return number


def text_row(prior: Prior, text: str | None) -> Tensor | None:
    """Return the text indices (length,) of a text, or None without one.

    Raises:
        ConfigError: the prior takes no text, or the text is empty or too long.
    """
    if text is None:
        return None
    if not isinstance(prior, TextPrior) or prior.tokenizer is None:
        raise ConfigError(
            f"text: this prior was trained without captions, got {text!r}: fastvq prior RUN --text --overwrite learns"
            " one that takes text"
        )
    return prior.tokenizer.encode(text)


def successor_is_finished(prior: StrPath) -> bool:
    """Return whether the successor of a prior has done all its steps."""
    successor = Path(prior) / SUCCESSOR_FOLDER
    return bool(checkpoint_folders(successor)) and load_latest(successor, PriorConfig).finished


def held_out_labels(prior: Prior, examples: Examples, rows: Tensor | Sequence[int]) -> Tensor | None:
    """Return what a prior takes as labels of some held-out examples: their classes, or captions, or None."""
    if isinstance(prior, TextPrior) and prior.tokenizer is not None:
        captions = examples.test_captions
        return None if captions is None else prior.tokenizer.rows([captions[int(row)] for row in rows])[:, 0]
    return examples.test_labels[rows] if prior.classes and examples.test_labels is not None else None


def conditions(
    prior: Prior, first: int, count: int, label: int | None, text: Tensor | None, *, in_turn: bool = True
) -> Tensor | None:
    """Return what a prior takes as labels of the samples from number `first` on, (count, ...), or None.

    Args:
        prior: the prior.
        first: number of the first sample.
        count: number of samples.
        label: the class of all samples.
        text: the text indices (length,) of all samples, see `text_row`.
        in_turn: whether each class comes in turn; otherwise samples without a label have no class.
    """
    if text is not None:
        return text.expand(count, -1)
    if not prior.classes or (label is None and not in_turn):
        return None
    return torch.arange(first, first + count) % prior.classes if label is None else torch.full((count,), label)


def warn_of_unfinished(folder: StrPath, checkpoint: Checkpoint, command: str) -> None:
    """Warn of a training that has not done all its steps; `command` continues it."""
    if not checkpoint.finished:
        steps = f"{checkpoint.step} of {checkpoint.config.steps} steps"
        warnings.warn(f"{folder} is unfinished, {steps}: {command}", RuntimeWarning, stacklevel=3)


def built(build: Callable[[], ModelT], checkpoint: Checkpoint) -> ModelT:
    """Return the model of a checkpoint, with its weights.

    It is built on "meta" first, where wrong sizes cost neither memory nor time.

    Raises:
        ValueError: the settings make no model, or another one than the tensors belong to.
    """
    weights = checkpoint.trained()
    try:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
        for name, tensor in weights.items():
            if tensor.shape != shapes.get(name, tensor.shape):
                raise ValueError(f"model.{name} is {tuple(tensor.shape)}, expected {tuple(shapes[name])}")
        model = build()
    except (RuntimeError, MemoryError, OverflowError, TypeError, KeyError) as error:
        raise ValueError(f"its settings make no model: {error}") from error
    checkpoint.load_model(model, trained=True)
    return model
