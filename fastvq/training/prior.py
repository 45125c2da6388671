"""The second training: a prior over the codes of a run's data set, in RUN/prior/."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq import VectorQuantize
from fastvq.coding import fingerprint
from fastvq.errors import CheckpointError, ConfigError
from fastvq.models import VQVAE, Prior
from fastvq.models.priors import PRIORS
from fastvq.runs.indices import BATCH, FOLDER, Codes, forget_codes, tokenize
from fastvq.runs.load import load_model

from .batches import batch_rows, moved
from .build import load_images
from .checkpoint import checkpoint_folders, load_latest
from .config import PriorConfig
from .loop import Loop, Measures, forget_run, usable_device

_LOGITS = 1 << 25
"""Of a batch that is evaluated, at most, where a single sample has no more."""


class PriorTrainer(Loop):
    """Train one prior in one folder; see `Loop`. The constructor sets torch's global random state.

    Args:
        config: the settings.
        codes: what it learns from.
        codebook_size: K.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        identity: of the model whose codes they are, `fingerprint(model).hex()`.
        vectors: (K, D), the codebook, see `TransformerPrior`.
        resume: go on from the latest checkpoint.
        replace: delete a run that is in the folder, once the settings are known to be good.

    Raises:
        ConfigError: settings that can't be, for these codes or here.
        CheckpointError: see `Loop.begin`.
    """

    config: PriorConfig
    model: Prior

    def __init__(
        self,
        config: PriorConfig,
        codes: Codes,
        codebook_size: int,
        folder: Path,
        *,
        identity: str,
        vectors: Tensor | None = None,
        resume: bool = False,
        replace: bool = False,
    ) -> None:
        if config.batch_size > len(codes.train):
            raise ConfigError(
                f"batch_size {config.batch_size} is more than the {len(codes.train)} samples to learn from"
            )
        self.codes, self.device = codes, usable_device(config.device)
        torch.manual_seed(config.seed)
        given = {"grid": tuple(codes.train.shape[1:]), "classes": codes.classes, **config.model_settings()}
        # Made on the CPU, so that it starts from the same weights on every device.
        model = _built(config.kind, codebook_size=codebook_size, vectors=vectors, **given).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay)
        built_from = {"kind": config.kind, "settings": model.settings}
        super().__init__(config, model, optimizer, folder, identity=identity, built_from=built_from)
        if replace:
            forget_run(folder)
        self.begin(resume=resume)

    def learn(self) -> None:
        config, codes = self.config, self.codes
        rows = batch_rows(self.step, count=len(codes.train), batch_size=config.batch_size, seed=config.seed)
        labels = None if codes.train_labels is None else moved(codes.train_labels[rows], self.device)
        # Gathered where they are mapped: one small copy goes to the device.
        loss = self.model.loss(moved(codes.train[rows], self.device).long(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._window += torch.stack([loss.detach(), torch.zeros_like(loss), torch.ones_like(loss)])

    def recent(self) -> tuple[Measures, str]:
        bits = float(self._window[0] / self._window[2]) / math.log(2)
        return {"bits_per_index": bits}, f"{bits:.2f} bits a code"

    def evaluate(self) -> tuple[float, Measures]:
        self.model.eval()
        bits = bits_per_index(self.model, self.codes.test, self.codes.test_labels)
        self.model.train()
        return bits, {"bits_per_index": bits}


def train_prior(
    run: Path, config: PriorConfig | None = None, *, resume: bool = False, progress: bool = True
) -> tuple[Prior, Codes] | None:
    """Learn the prior of a run's codes; return it, in eval mode and on the CPU, and the codes; None if interrupted.

    Args:
        run: folder of a run whose VQ-VAE is trained.
        config: settings; a resumed training keeps its own.
        resume: go on from RUN/prior/, where there is a state. Without it, an earlier prior there is replaced, once the
            settings are known to be good.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: the run has no checkpoint; to resume, the prior belongs to another model or its state is
            damaged. ConfigError: no such settings, or a run without codes. FloatingPointError: the loss isn't finite.
    """
    model, codes, codebook_size = codes_of(run)
    folder = run / FOLDER
    resume = resume and bool(checkpoint_folders(folder))
    config = _state(run, model).config if resume else config or PriorConfig()
    device = usable_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = PriorTrainer(
            config,
            codes,
            codebook_size,
            folder,
            identity=fingerprint(model).hex(),
            vectors=codebook_of(model),
            resume=resume,
            replace=not resume,
        )
        finished = trainer.fit(progress=progress)
    return (trainer.model.eval().cpu(), codes) if finished else None


def check_resumed(run: Path, given: dict[str, Any]) -> None:
    """Raises a ConfigError if a setting given by name differs from those of the prior that is gone on with."""
    if checkpoint_folders(run / FOLDER):
        own = load_latest(run / FOLDER, PriorConfig).config
        pairs = [(name, getattr(own, name), value) for name, value in given.items()]
        changed = [f"{name} {kept}, not {value}" for name, kept, value in pairs if kept != value]
        if changed:
            raise ConfigError(f"a resumed prior keeps its settings: {', '.join(changed)}")


def codes_of(run: Path) -> tuple[VQVAE, Codes, int]:
    """A run's model, its data set as codes, and K.

    Raises:
        CheckpointError: the run has no checkpoint. ConfigError: it was trained without a bottleneck.
    """
    model, config = load_model(run)
    if config.bottleneck == "none":
        raise ConfigError(f"{run} was trained without a bottleneck: it has no codes to learn a prior of")
    return model, tokenize(run, model, load_images(config), flip=config.flip), config.codebook_size


def codebook_of(model: VQVAE) -> Tensor | None:
    """(K, D), if the model has a single one."""
    return model.bottleneck.codebook if isinstance(model.bottleneck, VectorQuantize) else None


def forget_prior(run: Path) -> None:
    """Delete a run's prior and its codes, and nothing else."""
    forget_run(run / FOLDER)
    forget_codes(run)


def load_prior(run: Path) -> tuple[Prior, VQVAE]:
    """The trained prior of a run, in eval mode, and the model whose codes it knows, both on the CPU.

    Raises:
        CheckpointError: there is none, it is damaged, or it belongs to another model.
    """
    model, _ = load_model(run)
    state = _state(run, model)
    prior = _built(state.built_from["kind"], **state.built_from["settings"])
    prior.load_state_dict(state.part("model"))
    return prior.eval(), model


@torch.no_grad()
def bits_per_index(prior: Prior, codes: Tensor, labels: Tensor | None) -> float:
    """The mean over codes (N, *grid) of -log2 p, computed on the prior's device."""
    device = next(prior.parameters()).device
    batch = max(1, min(BATCH, _LOGITS // (prior.places * prior.codebook_size)))
    parts = labels.split(batch) if labels is not None else [None] * math.ceil(len(codes) / batch)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part, of in zip(codes.split(batch), parts, strict=True):
        total += prior.bits(moved(part, device).long(), None if of is None else moved(of, device)).sum()
    return total.item() / codes.numel()


def _built(kind: str, *, codebook_size: int, grid: Any, **settings: Any) -> Prior:
    try:
        return PRIORS[kind](codebook_size, tuple(grid), **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _state(run: Path, model: VQVAE) -> Any:
    folder = run / FOLDER
    if not checkpoint_folders(folder):
        raise CheckpointError(f"{run} has no prior yet: fastvq prior {run} learns one")
    state = load_latest(folder, PriorConfig)
    if state.data_fingerprint != fingerprint(model).hex():
        raise CheckpointError(f"{folder} holds the prior of another model: train it again without --resume")
    return state
