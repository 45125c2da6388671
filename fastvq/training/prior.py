"""The second training: a prior over the codes of a run's data set.

RUN/prior/ holds the data set as codes, written once and memory-mapped, and one state file that is replaced whole. As a
step depends on the seed and its number alone, a run that was interrupted ends with the same weights as one that wasn't.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq import VectorQuantize
from fastvq.coding import fingerprint
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.extras import require
from fastvq.files import whole
from fastvq.models import VQVAE, TransformerPrior
from fastvq.training.batches import batch_rows
from fastvq.training.build import load_images, load_model
from fastvq.training.checkpoint import CheckpointError
from fastvq.training.config import ConfigError, TrainConfig
from fastvq.training.interrupt import Interrupt

FOLDER, _STATE, _CODES = "prior", "state.safetensors", "codes"
_BATCH = 250


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """Settings of the prior and of its training.

    The learning rate rises over `warmup_steps` and falls to zero along half a cosine.
    """

    steps: int = 1400
    batch_size: int = 48
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    dim: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    label_dropout: float = 0.1
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, left)))


@dataclasses.dataclass(frozen=True)
class Codes:
    """A run's data set as codes, (N, *grid) int32 in mapped files, with the labels of its images if there are any."""

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None

    @property
    def classes(self) -> int:
        return 0 if self.train_labels is None else int(self.train_labels.max()) + 1


def tokenize(run: Path, model: VQVAE, images: Images, *, flip: bool) -> Codes:
    """The codes of a run's images, read from RUN/prior/ where they are those of this model, else written there.

    Args:
        flip: also the mirrored images to learn from, where the run learned from them as well.
    """
    folder = run / FOLDER
    description = {"model": fingerprint(model).hex(), "images": images.fingerprint(), "flip": flip}
    paths = {split: folder / f"{_CODES}-{split}.npy" for split in ("train", "test")}
    described = folder / f"{_CODES}.json"
    if not described.exists() or json.loads(described.read_text()) != description:
        described.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        train = torch.cat([images.train, images.train.flip(-1)]) if flip else images.train
        for split, pixels in (("train", train), ("test", images.test)):
            codes = torch.cat([model.encode(to_float(part)) for part in pixels.split(_BATCH)])
            with whole(paths[split]) as partial, partial.open("wb") as stream:
                np.save(stream, codes.numpy().astype(np.int32))
        with whole(described) as partial:
            partial.write_text(json.dumps(description) + "\n")
    # Copy-on-write, as torch wants memory that it could write to; nothing does.
    loaded = {split: torch.from_numpy(np.load(path, mmap_mode="c")) for split, path in paths.items()}
    labels = images.train_labels
    if labels is not None and flip:
        labels = labels.repeat(2)
    return Codes(loaded["train"], loaded["test"], labels, images.test_labels)


def train_prior(
    run: Path, config: PriorConfig | None = None, *, resume: bool = False, progress: bool = True
) -> tuple[TransformerPrior, Codes] | None:
    """Learn the prior of a run's codes; return it in eval mode with the codes, or None if it was interrupted.

    Args:
        run: folder of a run whose VQ-VAE is trained.
        config: settings; a resumed training keeps its own.
        resume: go on from RUN/prior/, where there is a state.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: the run has no checkpoint; to resume, the prior belongs to another model or its state is
            damaged. ConfigError: no such settings, or a run without codes. FloatingPointError: the loss isn't finite.
    """
    model, run_config = load_model(run)
    if run_config.bottleneck == "none":
        raise ConfigError(f"{run} was trained without a bottleneck: it has no codes to learn a prior of")
    codes = tokenize(run, model, load_images(run_config), flip=run_config.flip)
    identity = fingerprint(model).hex()
    step = 0
    if resume and (run / FOLDER / _STATE).exists():
        config, step, tensors = _load_state(run, identity)
    else:
        config, tensors = config or PriorConfig(), {}
    if config.batch_size > len(codes.train):
        raise ConfigError(f"batch_size {config.batch_size} is more than the {len(codes.train)} samples to learn from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        prior = build_prior(config, run_config, codes.train.shape[1:], codes.classes, _vectors(model))
        optimizer = torch.optim.AdamW(
            prior.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay, lr=config.learning_rate
        )
        if tensors:
            _restore(prior, optimizer, tensors)
        bar = require("tqdm").tqdm(
            total=config.steps, initial=step, unit="step", disable=not progress, dynamic_ncols=True
        )
        prior.train()
        with bar, Interrupt() as interrupt:
            while step < config.steps:
                loss = _train_step(prior, optimizer, codes, config, step)
                step += 1
                bar.update()
                last = step == config.steps or interrupt.requested
                if last or step % config.checkpoint_every == 0 or step % 20 == 0:
                    nats = float(loss)
                    if not math.isfinite(nats):
                        raise FloatingPointError(f"the loss is {nats} at step {step}: try a lower learning_rate")
                    bar.set_postfix_str(f"{nats / math.log(2):.2f} bits a code")
                if last or step % config.checkpoint_every == 0:
                    _save_state(run, config, step, identity, prior, optimizer)
                if interrupt.requested and step < config.steps:
                    return None
    return prior.eval(), codes


def forget_prior(run: Path) -> None:
    """Delete a run's prior and its codes, and nothing else."""
    for path in (run / FOLDER).glob("*"):
        if path.name.startswith((_STATE, f"{_CODES}-", f"{_CODES}.")):
            path.unlink()


def build_prior(
    config: PriorConfig,
    run_config: TrainConfig,
    grid: tuple[int, ...],
    classes: int,
    vectors: Tensor | None = None,
) -> TransformerPrior:
    """The untrained prior of these settings, from the codes' vectors if these are given."""
    try:
        return TransformerPrior(
            run_config.codebook_size,
            tuple(grid),
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            classes=classes,
            dropout=config.dropout,
            label_dropout=config.label_dropout,
            vectors=vectors,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_prior(run: Path) -> tuple[TransformerPrior, VQVAE]:
    """The trained prior of a run, in eval mode, and the model whose codes it knows.

    Raises:
        CheckpointError: there is none, it is damaged, or it belongs to another model.
    """
    model, run_config = load_model(run)
    config, _, tensors = _load_state(run, fingerprint(model).hex())
    axes = sorted(name for name in tensors if name.startswith("model.inputs.axes."))
    grid = tuple(len(tensors[name]) for name in axes)
    prior = build_prior(config, run_config, grid, len(tensors["model.inputs.labels.weight"]) - 1)
    prior.load_state_dict(_part(tensors, "model"))
    return prior.eval(), model


def _vectors(model: VQVAE) -> Tensor | None:
    return model.bottleneck.codebook if isinstance(model.bottleneck, VectorQuantize) else None


@torch.no_grad()
def bits_per_code(prior: TransformerPrior, codes: Tensor, labels: Tensor | None) -> float:
    """The mean over codes (N, *grid) of -log2 p."""
    parts = labels.split(_BATCH) if labels is not None else [None] * math.ceil(len(codes) / _BATCH)
    total = sum(float(prior.bits(part.long(), of).sum()) for part, of in zip(codes.split(_BATCH), parts, strict=True))
    return total / codes.numel()


def _train_step(
    prior: TransformerPrior, optimizer: torch.optim.Optimizer, codes: Codes, config: PriorConfig, step: int
) -> Tensor:
    rows = batch_rows(step, count=len(codes.train), batch_size=config.batch_size, seed=config.seed)
    torch.manual_seed(config.seed * 1_000_003 + step)  # dropout depends on the step alone
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    labels = None if codes.train_labels is None else codes.train_labels[rows]
    loss = prior.loss(codes.train[rows].long(), labels)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def _save_state(
    run: Path,
    config: PriorConfig,
    step: int,
    identity: str,
    prior: TransformerPrior,
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in prior.state_dict().items()}
    for name, parameter in prior.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
    about = {"config": json.dumps(dataclasses.asdict(config)), "step": str(step), "model": identity}
    save = require("safetensors.torch").save_file
    with whole(run / FOLDER / _STATE) as partial:
        save(tensors, str(partial), metadata=about)


def _load_state(run: Path, identity: str) -> tuple[PriorConfig, int, dict[str, Tensor]]:
    path = run / FOLDER / _STATE
    if not path.exists():
        raise CheckpointError(f"{run} has no prior yet: fastvq prior {run} learns one")
    try:
        with require("safetensors").safe_open(str(path), framework="pt") as file:
            about = file.metadata()
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        config, step = PriorConfig(**json.loads(about["config"])), int(about["step"])
    except (OSError, ValueError, KeyError, TypeError, require("safetensors").SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if about["model"] != identity:
        raise CheckpointError(f"{path} is the prior of another model: train it again without --resume")
    return config, step, tensors


def _restore(prior: TransformerPrior, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    prior.load_state_dict(_part(tensors, "model"))
    for name, parameter in prior.named_parameters():
        state = _part(tensors, f"optimizer.{name}")
        if state:
            optimizer.state[parameter] = state


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}
