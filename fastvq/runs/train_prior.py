"""Training of a run's prior, on the indices of the run's images."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvq.coding import fingerprint
from fastvq.errors import CheckpointError, ConfigError
from fastvq.files import StrPath, delete_folder, exclusive, flush_folder
from fastvq.models import Prior, TextTokenizer
from fastvq.training import config_file, ranks
from fastvq.training.checkpoint import Checkpoint, checkpoint_folders, load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.loggers import CSV_FILE
from fastvq.training.loop import delete_run, usable_device
from fastvq.training.prior import IndexData, PriorTrainer

from .indices import delete_indices, run_indices
from .load import PRIOR_FOLDER, SUCCESSOR_FOLDER, successor_is_finished


class TrainedPrior(NamedTuple):
    """Result of `train_prior`.

    Attributes:
        prior: the prior, in eval mode and on the CPU.
        data: the indices that it learned from and was evaluated on.
        bits_per_index: mean of -log2 p over the held-out indices.
    """

    prior: Prior
    data: IndexData
    bits_per_index: float


def train_prior(
    run: StrPath,
    config: PriorConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: StrPath | None = None,
    logger: str | None = None,
    progress: bool = True,
) -> TrainedPrior | None:
    """Train a prior on the indices of a run's images; return None, with the state saved, if interrupted.

    Args:
        run: folder of a run whose VQ-VAE is trained.
        config: settings; by default the defaults, or those of the training that is resumed, which may change in
            nothing but more steps.
        resume: continue the training in RUN/prior/ if it has a checkpoint, or that of a successor.
        overwrite: replace the prior that the run has. Its successor is trained in RUN/prior/successor/ and takes its
            place when it is finished; until then the run keeps its prior.
        data: where the data set of the run is now, see `run_examples`.
        logger: see `Loop.fit`.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: the run has no checkpoint; it has a prior, and neither `resume` nor `overwrite` is given;
            `resume` and the prior belongs to another model or is damaged; another process is training it, or the run
            itself.
        ConfigError: invalid settings, or a run without a bottleneck or, for a prior of text, without captions.
        DataError: the data are missing, or differ from those that the run was trained on.
        FloatingPointError: the loss is not finite.
    """
    folder = Path(run) / PRIOR_FOLDER
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: an interrupted successor is resumed as well")
    if not resume and not overwrite:
        _check_no_prior(run)
    load_latest(run, tensors=False)  # before anything is written to a folder that holds no run
    with contextlib.ExitStack() as held:
        if ranks.leads():
            held.enter_context(exclusive(run))  # a training of the run would change the model meanwhile
            held.enter_context(exclusive(folder))
        model, indices, codebook_size = ranks.rank_0_first(lambda: run_indices(run, data))
        identity = fingerprint(model).hex()
        ranks.rank_0_first(lambda: _adopt_successor(folder) if successor_is_finished(folder) else None)
        if not resume and not overwrite:
            _check_no_prior(run)
        successor = folder / SUCCESSOR_FOLDER
        replaces = bool(checkpoint_folders(successor)) or (overwrite and bool(checkpoint_folders(folder)))
        target = successor if replaces else folder
        resume = resume and bool(checkpoint_folders(target))
        if resume:
            latest = load_latest(target, PriorConfig)
            if latest.data_fingerprint != identity:
                raise CheckpointError(f"{target} holds the prior of another model: train it again with --overwrite")
            config = config or latest.config
        config = config or PriorConfig()
        if config.text:
            indices = _with_text(run, indices, config, latest.built_from.get("tokenizer") if resume else None)
        device = usable_device(config.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            trainer = PriorTrainer(
                config,
                indices,
                codebook_size,
                target,
                identity=identity,
                vectors=model.adapter.code_vectors(),
                resume=resume,
                replace=overwrite,
            )
            bits = trainer.fit(logger=logger, progress=progress)
        if bits is None:
            return None
        if replaces:
            ranks.rank_0_first(lambda: _adopt_successor(folder) if successor_is_finished(folder) else None)
    return TrainedPrior(trainer.model.eval().cpu(), indices, bits)


def _with_text(run: StrPath, data: IndexData, config: PriorConfig, tokenizer: dict[str, Any] | None) -> IndexData:
    """Return a run's indices with its captions, by the tokenizer of the training that is resumed or by a new one.

    Raises:
        ConfigError: there are no captions.
    """
    learned, _ = data.captions or ((), ())
    if not any(learned):
        raise ConfigError(
            f"text: the data of {run} have no captions to learn from: a folder has them in captions.jsonl, or in a .txt"
            " file beside each example"
        )
    if tokenizer is not None:
        return data.with_text(TextTokenizer(tokenizer))
    length = config.text_length
    return data.with_text(TextTokenizer.train(learned, vocabulary=config.text_vocabulary, length=length))


def _check_no_prior(run: StrPath) -> None:
    folder = Path(run) / PRIOR_FOLDER
    there = [*checkpoint_folders(folder), *checkpoint_folders(folder / SUCCESSOR_FOLDER)]
    if there:
        raise CheckpointError(
            f"{run} has a prior already ({there[0]}): resume it (--resume), or replace it (--overwrite), after which"
            " files that were coded with it are lost"
        )


def _adopt_successor(folder: Path) -> None:
    """Move the finished successor of a prior to its place.

    The checkpoints come last: as long as they are in the successor's folder, an interrupted move is repeated.
    """
    successor = folder / SUCCESSOR_FOLDER
    if (successor / "tensorboard").exists():
        if (folder / "tensorboard").exists():
            delete_folder(folder / "tensorboard")
        os.rename(successor / "tensorboard", folder / "tensorboard")
    for name in ("metrics.jsonl", CSV_FILE, config_file.NAME):
        if (successor / name).exists():
            os.replace(successor / name, folder / name)
    if (folder / "checkpoints").exists():
        delete_folder(folder / "checkpoints")
    os.rename(successor / "checkpoints", folder / "checkpoints")
    flush_folder(folder)
    delete_folder(successor)


def resumed_prior(run: StrPath) -> Checkpoint | None:
    """Return the checkpoint, without its tensors, that `train_prior` would resume, or None if there is none."""
    folder = Path(run) / PRIOR_FOLDER
    for place in (folder / SUCCESSOR_FOLDER, folder):
        if checkpoint_folders(place):
            return load_latest(place, PriorConfig, tensors=False)
    return None


def delete_prior(run: StrPath) -> None:
    """Delete a run's prior, an unfinished successor and its indices, and nothing else."""
    delete_run(Path(run) / PRIOR_FOLDER)
    delete_run(Path(run) / PRIOR_FOLDER / SUCCESSOR_FOLDER)
    delete_indices(run)
