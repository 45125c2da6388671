"""Training loop with records, evaluations and checkpoints, from which a run resumes to the last bit."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastvq import distributed
from fastvq.backends import devices
from fastvq.data.order import seed_of
from fastvq.errors import CheckpointError, ConfigError
from fastvq.extras import Progress, require
from fastvq.files import StrPath, delete_abandoned, delete_folder, exclusive, lock_of, write_whole
from fastvq.modalities.settings import Settings

from . import config_file, ranks
from .checkpoint import Checkpoint, checkpoint_folders, damage_named, load_latest, save
from .interrupt import Interrupt
from .loggers import CSV_FILE
from .metrics import MetricsLog

EvaluationT = TypeVar("EvaluationT")
Measures = dict[str, float | None]


class Loop(Generic[EvaluationT]):
    """Training of one model in one folder, which gets `checkpoints/`, `metrics.jsonl` and `config.toml`.

    The weights after n steps are a function of the settings and the data: however often the run is interrupted and
    resumed, they are equal to the last bit (on one machine, on the CPU, with one number of threads). The order of the
    data depends on seed and step alone; everything else that a step reads is in the checkpoint, torch's random state
    included. Evaluations and what they call leave that random state unchanged.

    One training writes to a folder at a time: `fit` holds a lock, and refuses if another one has saved a checkpoint
    since this object was made.

    A resumed run keeps its settings, but may have more steps: from there on the learning rate follows the schedule of
    the new number, and so rises again where the old number had brought it to zero. It may also have another path to
    the same data, files beside them that cannot be read, and another number of
    workers.

    A subclass defines a step (`learn`), the record of the steps since the last record (`recent`) and what is counted
    for it (`counted`), the evaluation on held-out data (`evaluate`), and what a checkpoint holds besides model and
    optimizer (`more_state`, `replicated`).

    Args:
        config: the settings.
        model, optimizer: the model and the optimizer of its parameters.
        folder: folder of the run.
        identity: fingerprint of the data; a run resumes only on data of the same fingerprint.
        built_from: arguments of the model that the settings do not contain.
    """

    config: Settings
    learns_from = "indices"
    device = torch.device("cpu")

    def __init__(
        self,
        config: Settings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: StrPath,
        *,
        identity: str,
        built_from: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.model, self.optimizer, self.folder = config, model, optimizer, Path(folder)
        # On several ranks all train, and rank 0 writes.
        self._leads = ranks.leads()
        if distributed.active():
            # As torch's generator, which the subclass has seeded.
            distributed.set_common_state(torch.tensor([seed_of(config.seed, "common", 0) >> 1, 0]))
        self.step, self.seconds = 0, 0.0
        self._identity, self._built_from = identity, built_from or {}
        # Sums since the last record: loss, a second measure, steps. On the device, so that no step waits for them.
        self._window = torch.zeros(3, dtype=torch.float64, device=self.device)

    def learn(self) -> None:
        """Learn from the batch of step `self.step`, and add (loss, second measure, 1) to the window."""
        raise NotImplementedError

    def recent(self) -> tuple[Measures, str]:
        """Return the record of the steps since the last record, and the same as text for the progress bar."""
        raise NotImplementedError

    def evaluate(self) -> tuple[EvaluationT, Measures]:
        """Return the evaluation on held-out data, and its measures for the record."""
        raise NotImplementedError

    def replicated(self) -> list[nn.Module]:
        """Return the modules that are equal to the last bit on all ranks, which each checkpoint checks."""
        return [self.model]

    def more_state(self) -> dict[str, Tensor]:
        """Return tensors besides model and optimizer that training goes on from, which are restored in place."""
        return {}

    def counted(self) -> dict[str, Tensor]:
        """Return tensors that count since the last record, parts of which each rank has; they are restored in place."""
        return {}

    def train_step(self) -> None:
        """Learn from one batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        self.learn()
        self.step += 1

    def begin(self, *, resume: bool) -> None:
        """Continue from the latest checkpoint, or check that there is none.

        Raises:
            CheckpointError: `resume` and there is no checkpoint, it is damaged, or the data differ; not `resume` and
                the folder already holds a run, or metrics of something else; another process or thread is writing
                there.
            ConfigError: `resume` and the settings differ from the checkpoint's, other than by more steps.
        """
        if not resume:
            self._check_metrics()
        with self._written_alone() if self.folder.is_dir() else contextlib.nullcontext():
            if resume:
                self._restore(load_latest(self.folder, type(self.config)))
            elif checkpoint_folders(self.folder):
                raise CheckpointError(f"{self.folder} already holds a run: resume it, or choose another folder")
            self._continues_from = self._latest()
        # Before any rank may write.
        ranks.wait()

    def _check_metrics(self) -> None:
        """Raise a CheckpointError if the folder has records of something else."""
        metrics = self.folder / "metrics.jsonl"
        # Every training has begun by locking its folder.
        if metrics.exists() and metrics.stat().st_size and not lock_of(self.folder).exists():
            raise CheckpointError(f"{metrics} was not written by a training in this folder: choose another folder")

    def _written_alone(self) -> contextlib.AbstractContextManager[Any]:
        """Return the lock of the folder, which rank 0 holds for all."""
        return exclusive(self.folder) if self._leads else contextlib.nullcontext()

    def fit(
        self,
        *,
        on_evaluation: Callable[[Any, EvaluationT], object] | None = None,
        logger: str | None = None,
        progress: bool = True,
    ) -> EvaluationT | None:
        """Train to the last step and return the evaluation after it.

        Returns None, with the state saved, if Ctrl-C or SIGTERM arrives, also during the last step or its evaluation.
        The last step is evaluated once, also when a finished run is resumed.

        Args:
            on_evaluation: called with this object and the evaluation after each evaluation, the last one included,
                when the state is saved. A run that is resumed at a step that is evaluated evaluates it again for this
                call, since the earlier one may not have come to its end.
            logger: what the records are written to besides metrics.jsonl: "tensorboard", "wandb", "csv" or "none"; by
                default TensorBoard where it is installed.
            progress: show the progress on stderr, see `fastvq.extras.Progress`.

        Raises:
            CheckpointError: another process or thread is writing to the folder, or has saved a checkpoint there since
                this object was made.
            FloatingPointError: the loss is not finite.
        """
        require("safetensors.torch")  # before hours of training whose checkpoints need it
        with self._written_alone():
            if self._leads and self._latest() != self._continues_from:
                raise CheckpointError(
                    f"another training has written {self._latest() or 'to it'} in {self.folder} since this one began: "
                    "resume it, or choose another folder"
                )
            if self._leads:
                for folder in (self.folder, self.folder / "checkpoints"):
                    delete_abandoned(folder)
            return self._fit(on_evaluation, logger, progress=progress and self._leads)

    def _fit(
        self, on_evaluation: Callable[[Any, EvaluationT], object] | None, logger: str | None, *, progress: bool
    ) -> EvaluationT | None:
        config = self.config
        evaluation: EvaluationT | None = None
        bar = Progress(config.steps, "step", initial=self.step, shown=progress)
        self.model.train()
        records: contextlib.AbstractContextManager[MetricsLog | None] = contextlib.nullcontext()
        if self._leads:
            write_whole(self.folder / config_file.NAME, config_file.to_toml(config).encode(errors="replace"))
            records = MetricsLog(self.folder, step=self.step, logger=logger, settings=config.to_json())
        with bar, records as log, Interrupt() as interrupt:
            if self.step and self._evaluation_is_due() and on_evaluation is not None:
                evaluation = self._evaluate_again(on_evaluation)
            started = time.monotonic() - self.seconds
            stop = ranks.any_requests(interrupt.requested)
            while self.step < config.steps and not stop:
                self.train_step()
                self.seconds = time.monotonic() - started
                bar.update()
                stop = ranks.any_requests(interrupt.requested)
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    self._check_finite()
                    self._collect()
                    values, text = self.recent()
                    self._window.zero_()
                    if log is not None:
                        learning_rate = config.learning_rate_at(self.step - 1)
                        log.write(self.step, "train", **values, learning_rate=learning_rate)
                    bar.say(text)
                due = self._evaluation_is_due()
                if due:
                    self._check_finite()
                    with self._random_state_kept():
                        evaluation, measures = self.evaluate()
                    if log is not None:
                        log.write(self.step, "test", **measures)
                    stop = ranks.any_requests(stop or interrupt.requested)
                if due or self.step % config.checkpoint_every == 0 or stop:
                    self._check_finite()
                    checkpoint = self._checkpoint()
                    if log is not None:
                        # Records first: those up to the checkpoint's step must be on disk whenever the checkpoint is.
                        log.flush_to_disk()
                        save(self.folder, checkpoint)
                        self._continues_from = self._latest()
                if due:
                    # After the save: whatever happens in the call, no step is lost.
                    if evaluation is not None and not stop:
                        self._report(on_evaluation, evaluation)
                    stop = ranks.any_requests(stop or interrupt.requested)
            if stop:
                return None
            if evaluation is None:  # the run was finished before: its record exists, its evaluation does not
                evaluation, _ = self.evaluate()
            stop = ranks.any_requests(interrupt.requested)
        return None if stop else evaluation

    def _evaluation_is_due(self) -> bool:
        return self.step == self.config.steps or self.step % self.config.evaluate_every == 0

    def _evaluate_again(self, on_evaluation: Callable[[Any, EvaluationT], object]) -> EvaluationT:
        """Repeat the evaluation of the step that the run continues from, whose record exists, for its call."""
        with self._random_state_kept():
            evaluation, _ = self.evaluate()
        self._report(on_evaluation, evaluation)
        return evaluation

    def _report(self, on_evaluation: Callable[[Any, EvaluationT], object] | None, evaluation: EvaluationT) -> None:
        """Call `on_evaluation` on rank 0."""
        if on_evaluation is not None and self._leads:
            with self._random_state_kept():
                on_evaluation(self, evaluation)

    def _collect(self) -> None:
        """Sum what was counted since the last record over the ranks, on rank 0."""
        ranks.collect_(self._window, *self.counted().values())

    @contextlib.contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            yield

    def _latest(self) -> str | None:
        """Return the name of the folder's latest checkpoint."""
        folders = checkpoint_folders(self.folder)
        return folders[-1].name if folders else None

    def _check_finite(self) -> None:
        """Raise if the loss is not finite, before the model is evaluated or replaces a good checkpoint."""
        total = float(self._window[0])
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total} at step {self.step}: try a lower learning_rate")

    def _checkpoint(self) -> Checkpoint:
        self._collect()
        for module in self.replicated():
            distributed.check_synchronized(module)
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["window.sums"] = self._window
        tensors |= self.more_state() | self.counted()
        if distributed.active():
            tensors["random.common"] = distributed.common_state()
        for name, state in self._random_states():
            tensors |= {_of_rank(name, rank): own for rank, own in enumerate(ranks.gathered(state))}
        return Checkpoint(self.step, self.seconds, self.config, self._identity, tensors, self._built_from)

    def _restore(self, checkpoint: Checkpoint) -> None:
        changes = checkpoint.config.differences(self.config)
        _, steps = changes.pop("steps", (0, None))
        # The fingerprint tells whether the data at another path, or without the unreadable files, are the same.
        old_data, data = changes.pop("data", 2 * (getattr(self.config, "data", "the model of these indices"),))
        for name in ("skip_unreadable", "workers"):
            changes.pop(name, None)
        if changes:
            listed = ", ".join(f"{name} from {old!r} to {new!r}" for name, (old, new) in changes.items())
            raise ConfigError(f"a resumed run keeps its settings, but these changed: {listed}")
        if steps is not None:
            _check_more_steps(checkpoint, steps)
        if checkpoint.data_fingerprint != self._identity:
            raise CheckpointError(
                f"the data differ from those that the run in {self.folder} started with: {data} has the fingerprint"
                f" {self._identity}, {old_data} had {checkpoint.data_fingerprint}"
            )
        learned_from, own = checkpoint.built_from.get("data"), self._built_from.get("data")
        if learned_from not in (None, own):
            raise CheckpointError(
                f"the {self.learns_from} differ from those that {self.folder} started with: they have the fingerprint"
                f" {own}, those had {learned_from}"
            )
        with damage_named(checkpoint.folder):
            self._restore_state(checkpoint)
        self.step, self.seconds = checkpoint.step, checkpoint.seconds

    def _restore_state(self, checkpoint: Checkpoint) -> None:
        """Copy the tensors of a checkpoint into the model, the optimizer and the random state.

        Raises:
            ValueError: a tensor is missing, or of another shape or type.
        """
        checkpoint.load_model(self.model)
        stepped = {name.rpartition(".")[0] for name in checkpoint.part("optimizer")}
        for name, parameter in self.model.named_parameters():
            # A parameter that no loss depends on, as some of a quantizer's, has no state; not all can be like that.
            idle = bool(stepped) and name not in stepped
            if checkpoint.step and parameter.requires_grad and not idle:
                self.optimizer.state[parameter] = {
                    # The step count stays on the CPU, where reading it never waits for the device.
                    "step": checkpoint.tensor_like(f"optimizer.{name}.step", torch.zeros(())),
                    # On the parameter's device and in its memory format, as Adam itself creates them.
                    **{
                        key: torch.empty_like(parameter, requires_grad=False).copy_(
                            checkpoint.tensor_like(f"optimizer.{name}.{key}", parameter)
                        )
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
        for name, tensor in self.more_state().items():
            tensor.copy_(checkpoint.tensor_like(name, tensor))
        for name, tensor in {"window.sums": self._window, **self.counted()}.items():
            tensor.copy_(checkpoint.tensor_like(name, tensor))
            if not self._leads:
                tensor.zero_()
        rank = distributed.rank()
        if distributed.active() and "random.common" in checkpoint.tensors:
            distributed.set_common_state(checkpoint.tensor_like("random.common", distributed.common_state()))
        if rank and _of_rank("random.cpu", rank) not in checkpoint.tensors:
            # There were fewer ranks.
            torch.manual_seed(seed_of(self.config.seed, f"rank {rank}", checkpoint.step))
            return
        try:
            for name, state in self._random_states():
                saved = checkpoint.tensor_like(_of_rank(name, rank), state)
                if name == "random.cpu":
                    torch.set_rng_state(saved)
                else:
                    torch.cuda.set_rng_state(saved, self.device)
        except RuntimeError as error:
            raise ValueError(f"the random state is invalid: {error}") from error

    def _random_states(self) -> Iterator[tuple[str, Tensor]]:
        """Yield torch's random states, on the CPU, by their names in a checkpoint."""
        yield "random.cpu", torch.get_rng_state()
        if self.device.type == "cuda":
            yield "random.cuda", torch.cuda.get_rng_state(self.device)


def _of_rank(name: str, rank: int) -> str:
    """Return the name of a tensor of one rank in a checkpoint; rank 0 has that of a single process."""
    return f"{name}.rank{rank}" if rank else name


def usable_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ConfigError: torch cannot use the device here, or the device lacks float64.
    """
    try:
        return ranks.local_device(devices.usable_device(name))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def describe_resumed(checkpoint: Checkpoint, config: Settings) -> str:
    """Return a line about the step that a run is resumed at, and what its schedule does where it gets more steps.

    Raises:
        ConfigError: the run has done as many steps already.
    """
    step, steps = checkpoint.step, config.steps
    if checkpoint.config.steps == steps:
        if step < steps:
            return f"resuming at step {step} of {steps}"
        return f"step {step} of {steps}: the training is finished; --steps {2 * steps} would continue it"
    _check_more_steps(checkpoint, steps)
    before, after = checkpoint.config.learning_rate_at(max(0, step - 1)), config.learning_rate_at(step)
    return (
        f"resuming at step {step} of {checkpoint.config.steps}, to {steps}: the learning rate goes on as in a training"
        f" of {steps} steps, from {before:.2g} to {after:.2g} at once"
    )


def _check_more_steps(checkpoint: Checkpoint, steps: int) -> None:
    if steps <= checkpoint.step:
        raise ConfigError(f"steps must be more than the {checkpoint.step} that the run has done, got {steps}")


def delete_run(folder: StrPath) -> None:
    """Delete the checkpoints, records and config.toml of an earlier run in `folder`, and nothing else."""
    for checkpoint in checkpoint_folders(folder):
        delete_folder(checkpoint)
    for name in ("metrics.jsonl", CSV_FILE, config_file.NAME):
        (Path(folder) / name).unlink(missing_ok=True)
