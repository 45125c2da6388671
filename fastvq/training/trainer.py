"""The training loop, and what of it a checkpoint has to hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastvq
from fastvq.data import DataError, Images
from fastvq.data.images import to_float
from fastvq.extras import require
from fastvq.training.batches import batch_rows, flip_some
from fastvq.training.build import build_model
from fastvq.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    discard,
    load_latest,
    save,
)
from fastvq.training.config import ConfigError, TrainConfig
from fastvq.training.evaluation import Evaluation, evaluate, psnr_db
from fastvq.training.interrupt import Interrupt
from fastvq.training.metrics import MetricsLog

OnEvaluation = Callable[["Trainer", Evaluation], object]


class Trainer:
    """Train one VQ-VAE in one folder.

        loss = mean((reconstruction - x)^2) / reconstruction_variance + the bottleneck's loss

    The weights after n steps are a function of the settings and the data: however often the run was interrupted and
    resumed, they are the same to the last bit (on one machine, on the CPU, with one number of threads). Data order and
    flips depend on seed and step alone; everything else that a step reads is in the checkpoint, torch's random state
    included. The constructor sets torch's global random state.

    Args:
        config: the settings.
        images: the data set, as `load_images(config)` gives it.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        resume: go on from the latest checkpoint in `folder`, with the same settings and data.

    Raises:
        DataError: the images don't fit the settings.
        CheckpointError: `resume` and there is no checkpoint, it is damaged, or the data are others; not `resume` and
            the folder already holds a run.
        ConfigError: `resume` and the settings differ from the checkpoint's; the device isn't there.
    """

    def __init__(self, config: TrainConfig, images: Images, folder: Path, *, resume: bool = False) -> None:
        if config.batch_size > len(images.train):
            raise DataError(f"batch_size {config.batch_size} is more than the {len(images.train)} training images")
        self.config, self.images, self.folder = config, images, folder
        self.step, self.seconds = 0, 0.0
        self.device = _usable_device(config.device)
        self._data_fingerprint = images.fingerprint()
        torch.manual_seed(config.seed)
        # With channels last the grid's vectors reach the quantizer without a copy: a quarter of a CPU step's time.
        self.model = build_model(config).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        bottleneck = self.model.bottleneck
        self._quantizer = bottleneck if isinstance(bottleneck, fastvq.VectorQuantize) else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.99))
        self._train_images = images.train.to(self.device)
        # Sums since the last record: loss, squared error, steps. On the device, so that no step waits for them.
        self._window = torch.zeros(3, dtype=torch.float64, device=self.device)
        if resume:
            self._restore(load_latest(folder))
        elif checkpoint_folders(folder):
            raise CheckpointError(f"{folder} already holds a run: resume it, or choose another folder")

    def train_step(self) -> None:
        """Learn from one batch."""
        config = self.config
        rows = batch_rows(self.step, count=len(self._train_images), batch_size=config.batch_size, seed=config.seed)
        x = to_float(self._train_images[rows.to(self.device)])
        if config.flip:
            x = flip_some(x, self.step, seed=config.seed)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        output = self.model(x)
        squared_error = (output.reconstruction - x).square().mean()
        loss = squared_error / config.reconstruction_variance + output.loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._window += torch.stack([loss.detach(), squared_error.detach(), torch.ones_like(loss)])
        self.step += 1

    def fit(self, *, on_evaluation: OnEvaluation | None = None, progress: bool = True) -> bool:
        """Train to the last step; return False if Ctrl-C or SIGTERM ended the run early, with its state saved.

        Args:
            on_evaluation: called after each evaluation on the held-out images.
            progress: show a progress bar on stderr.

        Raises:
            FloatingPointError: the loss isn't finite.
        """
        config = self.config
        bar = require("tqdm").tqdm(
            total=config.steps, initial=self.step, unit="step", disable=not progress, dynamic_ncols=True
        )
        self.model.train()
        with bar, MetricsLog(self.folder, step=self.step) as log, Interrupt() as interrupt:
            started = time.monotonic() - self.seconds
            while self.step < config.steps:
                self.train_step()
                self.seconds = time.monotonic() - started
                bar.update()
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    bar.set_postfix_str(self._log_training(log))
                if last or self.step % config.evaluate_every == 0:
                    self._check_finite()
                    evaluation = evaluate(self.model, self.images.test)
                    log.write(self.step, "test", **_measures(evaluation))
                    if on_evaluation is not None:
                        on_evaluation(self, evaluation)
                stop = interrupt.requested
                if last or self.step % config.checkpoint_every == 0 or stop:
                    self._check_finite()
                    # Records first: those up to the checkpoint's step must be there whenever the checkpoint is.
                    log.flush_to_disk()
                    save(self.folder, self._checkpoint())
                if stop:
                    break
        return self.step == config.steps

    def _log_training(self, log: MetricsLog) -> str:
        """Write the record of the steps since the last one, and return it for the progress bar."""
        self._check_finite()
        loss, squared_error = (self._window[:2] / self._window[2]).tolist()
        self._window.zero_()
        values = {
            "loss": loss,
            "psnr_db": psnr_db(squared_error),
            "learning_rate": self.config.learning_rate_at(self.step - 1),
        }
        text = f"loss {loss:.3f}, PSNR {values['psnr_db']:.2f} dB"
        if self._quantizer is not None:
            counts = self._quantizer.code_counts
            values |= {"perplexity": float(fastvq.perplexity(counts)), "usage": float(fastvq.usage(counts))}
            self._quantizer.reset_health()
            text += f", perplexity {values['perplexity']:.0f}"
        log.write(self.step, "train", **values)
        return text

    def _check_finite(self) -> None:
        """Raise before a loss that isn't finite is evaluated, or saved over a checkpoint that is good."""
        total = float(self._window[0])
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total} at step {self.step}: try a lower learning_rate")

    def _checkpoint(self) -> Checkpoint:
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["window.sums"] = self._window
        if self._quantizer is not None:
            tensors["window.code_counts"] = self._quantizer.code_counts
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(self.step, self.seconds, self.config, self._data_fingerprint, tensors)

    def _restore(self, checkpoint: Checkpoint) -> None:
        changes = checkpoint.config.differences(self.config)
        if changes:
            listed = ", ".join(f"{name} from {old!r} to {new!r}" for name, (old, new) in changes.items())
            raise ConfigError(f"a resumed run keeps its settings, but these changed: {listed}")
        if checkpoint.data_fingerprint != self._data_fingerprint:
            raise CheckpointError(
                f"the images of {self.config.data} are not those that the run in {self.folder} began with"
            )
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.model.load_state_dict(checkpoint.part("model"))
        for name, parameter in self.model.named_parameters():
            state = checkpoint.part(f"optimizer.{name}")
            if state:
                self.optimizer.state[parameter] = {key: _laid_out_as(parameter, value) for key, value in state.items()}
        self._window.copy_(checkpoint.tensors["window.sums"])
        if self._quantizer is not None:
            self._quantizer.code_counts.copy_(checkpoint.tensors["window.code_counts"])
        torch.set_rng_state(checkpoint.tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.tensors["random.cuda"], self.device)


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a moment of Adam in the parameter's device and memory format, as Adam itself would have made it."""
    if value.shape != parameter.shape:
        # The count of steps stays on the CPU, where reading it never waits for the device.
        return value
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _usable_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{name}' can't be used here: {str(error).splitlines()[0]}") from error


def forget_run(folder: Path) -> None:
    """Delete the checkpoints and metrics of an earlier run in `folder`, and nothing else there."""
    for checkpoint in checkpoint_folders(folder):
        discard(checkpoint)
    (folder / "metrics.jsonl").unlink(missing_ok=True)


def _measures(evaluation: Evaluation) -> dict[str, float | None]:
    return {"psnr_db": evaluation.psnr_db, "perplexity": evaluation.perplexity, "usage": evaluation.usage}
