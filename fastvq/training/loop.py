"""The loop that every training here runs in, and what of it a checkpoint has to hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.errors import CheckpointError, ConfigError
from fastvq.extras import require

from .checkpoint import Checkpoint, checkpoint_folders, discard, load_latest, save
from .config import Settings
from .interrupt import Interrupt
from .metrics import MetricsLog

Measures = dict[str, float | None]


class Loop:
    """Train one model in one folder, which gets `checkpoints/` and `metrics.jsonl`.

    The weights after n steps are a function of the settings and the data: however often the run was interrupted and
    resumed, they are the same to the last bit (on one machine, on the CPU, with one number of threads). The order of
    the data depends on seed and step alone; everything else that a step reads is in the checkpoint, torch's random
    state included.

    A training says what a step is (`learn`), what happened since the last record (`recent`), how good the model is
    on held-out data (`evaluate`), and what of its state a checkpoint has to hold besides model and optimizer.

    Args:
        config: the settings.
        model, optimizer: what learns.
        folder: of the run.
        identity: tells the data apart that runs learn from.
        built_from: what else is needed to build the model again.
    """

    config: Settings
    device = torch.device("cpu")

    def __init__(
        self,
        config: Settings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        *,
        identity: str,
        built_from: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.model, self.optimizer, self.folder = config, model, optimizer, folder
        self.step, self.seconds = 0, 0.0
        self._identity, self._built_from = identity, built_from or {}
        # Sums since the last record: what is measured, and steps. On the device, so that no step waits for them.
        self._window = torch.zeros(3, dtype=torch.float64, device=self.device)

    def learn(self) -> None:
        """Learn from the batch of step `self.step`, and add what it measures to the window: the loss, another, one."""
        raise NotImplementedError

    def recent(self) -> tuple[Measures, str]:
        """The record of the steps since the last one, and the same as text for the progress bar."""
        raise NotImplementedError

    def evaluate(self) -> tuple[Any, Measures]:
        """How good the model is on held-out data, for `on_evaluation` and for the record."""
        raise NotImplementedError

    def more_state(self) -> dict[str, Tensor]:
        """Tensors besides model, optimizer, window and random state, which are restored in place."""
        return {}

    def train_step(self) -> None:
        """Learn from one batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        self.learn()
        self.step += 1

    def begin(self, *, resume: bool) -> None:
        """Go on from the latest checkpoint, or make sure that there is none.

        Raises:
            CheckpointError: `resume` and there is no checkpoint, it is damaged, or the data are others; not `resume`
                and the folder already holds a run.
            ConfigError: `resume` and the settings differ from the checkpoint's.
        """
        if resume:
            self._restore(load_latest(self.folder, type(self.config)))
        elif checkpoint_folders(self.folder):
            raise CheckpointError(f"{self.folder} already holds a run: resume it, or choose another folder")

    def fit(self, *, on_evaluation: Callable[[Any, Any], object] | None = None, progress: bool = True) -> bool:
        """Train to the last step; return False if Ctrl-C or SIGTERM ended the run early, with its state saved.

        Args:
            on_evaluation: called with this and the evaluation after each on the held-out data.
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
                    self._check_finite()
                    values, text = self.recent()
                    self._window.zero_()
                    learning_rate = config.learning_rate_at(self.step - 1)
                    log.write(self.step, "train", **values, learning_rate=learning_rate)
                    bar.set_postfix_str(text)
                if last or self.step % config.evaluate_every == 0:
                    self._check_finite()
                    evaluation, measures = self.evaluate()
                    log.write(self.step, "test", **measures)
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
        tensors |= self.more_state()
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(self.step, self.seconds, self.config, self._identity, tensors, self._built_from)

    def _restore(self, checkpoint: Checkpoint) -> None:
        changes = checkpoint.config.differences(self.config)
        if changes:
            listed = ", ".join(f"{name} from {old!r} to {new!r}" for name, (old, new) in changes.items())
            raise ConfigError(f"a resumed run keeps its settings, but these changed: {listed}")
        if checkpoint.data_fingerprint != self._identity:
            raise CheckpointError(f"the data are not those that the run in {self.folder} began with")
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.model.load_state_dict(checkpoint.part("model"))
        for name, parameter in self.model.named_parameters():
            state = checkpoint.part(f"optimizer.{name}")
            if state:
                self.optimizer.state[parameter] = {key: _laid_out_as(parameter, value) for key, value in state.items()}
        self._window.copy_(checkpoint.tensors["window.sums"])
        for name, tensor in self.more_state().items():
            tensor.copy_(checkpoint.tensors[name])
        torch.set_rng_state(checkpoint.tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.tensors["random.cuda"], self.device)


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: it isn't there, or torch was built without it.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{name}' can't be used here: {str(error).splitlines()[0]}") from error


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a moment of Adam in the parameter's device and memory format, as Adam itself would have made it."""
    if value.shape != parameter.shape:
        # The count of steps stays on the CPU, where reading it never waits for the device.
        return value
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def forget_run(folder: Path) -> None:
    """Delete the checkpoints and metrics of an earlier run in `folder`, and nothing else there."""
    for checkpoint in checkpoint_folders(folder):
        discard(checkpoint)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
