"""Training of a prior on given grids of indices."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvq import distributed
from fastvq.data.examples import to_device
from fastvq.data.order import own_rows, seed_of
from fastvq.errors import ConfigError
from fastvq.files import StrPath
from fastvq.models import TextPrior, TextTokenizer
from fastvq.models.priors import PRIORS, TEXT_PRIORS, Prior

from . import ranks
from .config import PriorConfig
from .loop import Loop, Measures, delete_run, usable_device
from .ranks import every_rank_its_own, sum_over_ranks_

_BATCH = 250
_LOGITS = 1 << 25
"""Limit of the number of logits in a batch that is evaluated; a single sample may exceed it."""


@dataclass(frozen=True)
class IndexData:
    """Data set as grids of indices.

    Attributes:
        train, test: (N, *grid), any integer type; those to learn from and those held out.
        train_labels, test_labels: (N,), int64, or None for samples without classes; with a tokenizer, the captions as
            its text indices (N, V, length).
        class_names: the name of each label, or None.
        scales: shapes of the grids whose indices follow each other in a sample, or None for a single grid.
        captions: texts of the samples to learn from and of those held out, or None.
        tokenizer: what made text indices of them, or None.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    class_names: tuple[str, ...] | None = None
    scales: tuple[tuple[int, ...], ...] | None = None
    captions: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    tokenizer: TextTokenizer | None = None

    @property
    def classes(self) -> int:
        """Number of classes; 0 for samples without labels, or with captions in their place."""
        return 0 if self.train_labels is None or self.tokenizer else int(self.train_labels.max()) + 1

    def with_text(self, tokenizer: TextTokenizer) -> IndexData:
        """Return the data set with captions as text indices in place of labels."""
        train, test = self.captions or ((), ())
        return dataclasses.replace(
            self,
            train_labels=tokenizer.rows(train),
            test_labels=tokenizer.rows(test),
            class_names=None,
            tokenizer=tokenizer,
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 of all indices and labels."""
        digest = hashlib.sha256()
        for values in (self.train, self.test, self.train_labels, self.test_labels):
            digest.update(repr(None if values is None else (tuple(values.shape), values.dtype)).encode())
            if values is not None:
                digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()


class PriorTrainer(Loop[float]):
    """Training of one prior in one folder; see `Loop`. The constructor sets torch's global random state.

    An evaluation is the mean of -log2 p over the held-out indices, see `bits_per_index`.

    Args:
        config: the settings.
        data: the indices to learn from and to evaluate on.
        codebook_size: K; for several indices at each position, K of each.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        identity: fingerprint of the model that made the indices, `fingerprint(model).hex()`.
        vectors: (K, D), the codebook, or all of them, see `TransformerPrior`.
        resume: continue from the latest checkpoint.
        replace: delete a training that is in the folder, after the settings have been validated.

    Raises:
        ConfigError: settings that are invalid for these indices or on this machine.
        CheckpointError: see `Loop.begin`.
    """

    config: PriorConfig
    model: Prior

    def __init__(
        self,
        config: PriorConfig,
        data: IndexData,
        codebook_size: int | tuple[int, ...],
        folder: StrPath,
        *,
        identity: str,
        vectors: Tensor | Sequence[Tensor] | None = None,
        resume: bool = False,
        replace: bool = False,
    ) -> None:
        if config.batch_size > len(data.train):
            raise ConfigError(
                f"batch_size must be at most {len(data.train)}, the number of samples to learn from,"
                f" got {config.batch_size}"
            )
        self.data, self.device = data, usable_device(config.device)
        torch.manual_seed(config.seed)
        settings = {"grid": tuple(data.train.shape[1:]), "classes": data.classes, **config.model_settings()}
        if PRIORS[config.kind].in_scales:
            if data.scales is None:
                raise ConfigError(
                    f"kind must be one for a single grid of indices, got {config.kind}, which is for several: those of"
                    " the bottleneck hierarchical, or of a VQ-VAE-2"
                )
            settings["scales"] = data.scales
        if isinstance(vectors, tuple) and isinstance(codebook_size, int):
            # Codebooks of several scales start a prior that knows scales, unless a scale has several codebooks.
            apart = "scales" in settings and len(vectors) == len(data.scales or ())
            vectors = vectors if apart else None
        if data.tokenizer is not None:
            settings |= {"vocabulary": data.tokenizer.vocabulary, "text_length": data.tokenizer.length}
        # Built on the CPU, so that it starts from the same weights on every device.
        model = build_prior(config.kind, codebook_size=codebook_size, vectors=vectors, **settings).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay)
        model.class_names = data.class_names or ()
        built_from = {"kind": config.kind, "settings": model.settings, "data": data.fingerprint()}
        if data.class_names:
            built_from["class_names"] = list(data.class_names)
        if isinstance(model, TextPrior) and data.tokenizer is not None:
            model.tokenizer, built_from["tokenizer"] = data.tokenizer, data.tokenizer.to_json()
        super().__init__(config, model, optimizer, folder, identity=identity, built_from=built_from)
        self._losses = ranks.synchronized(model, "losses")
        if distributed.rank():
            # Each rank drops others of its inputs; the model was built from the same state.
            torch.manual_seed(seed_of(config.seed, "rank", distributed.rank()))
        own_rows(0, count=len(data.train), batch_size=config.batch_size, seed=config.seed)  # the ranks divide a batch
        if replace and ranks.leads():
            delete_run(folder)
        ranks.wait()
        self.begin(resume=resume)

    def learn(self) -> None:
        """Minimize the loss of one batch."""
        config, data = self.config, self.data
        rows = own_rows(self.step, count=len(data.train), batch_size=config.batch_size, seed=config.seed)
        labels = None if data.train_labels is None else to_device(data.train_labels[rows], self.device)
        # Gathered from the mapped file on the CPU: only the batch is copied to the device.
        indices = to_device(data.train[rows], self.device).long()
        seen = (corrupted(indices, self.model.sizes, config.corruption),) if config.corruption else ()
        loss, nats = self._losses(indices, labels, *seen)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._window += torch.stack([nats.detach(), torch.zeros_like(nats), torch.ones_like(nats)])

    def recent(self) -> tuple[Measures, str]:
        """Return the mean bits per index since the last record, and a text for the progress bar."""
        bits = float(self._window[0] / self._window[2]) / math.log(2)
        return {"bits_per_index": bits}, f"{bits:.2f} bits per index"

    def evaluate(self) -> tuple[float, Measures]:
        """Return the bits per held-out index, and the same as a record."""
        self.model.eval()
        bits = bits_per_index(self.model, self.data.test, self.data.test_labels, together=True)
        self.model.train()
        return bits, {"bits_per_index": bits}


def corrupted(indices: Tensor, sizes: Sequence[int], most: float) -> Tensor:
    """Return indices (B, *grid) of which random ones replace a share, for each sample a random one of at most `most`.

    A prior that learns to predict the true indices from these goes on sensibly after an unlikely sample, relies less on
    neighbors and more on label or caption, and memorizes its examples later.

    Args:
        indices: (B, *grid), int64.
        sizes: K of the places in turn, see `Prior.sizes`.
        most: the largest share.
    """
    flat = indices.flatten(1)
    limits = torch.tensor(sizes, device=flat.device).repeat(flat.shape[1] // len(sizes))
    others = (torch.rand(flat.shape, device=flat.device) * limits).long()
    shares = most * torch.rand(len(flat), 1, device=flat.device)
    return torch.where(torch.rand(flat.shape, device=flat.device) < shares, others, flat).view_as(indices)


def build_prior(kind: str, *, codebook_size: int | Sequence[int], grid: Any, **settings: Any) -> Prior:
    """Return the untrained prior of a kind, its weights drawn from torch's current random state.

    Raises:
        ConfigError: a setting that this kind does not accept.
    """
    try:
        return (TEXT_PRIORS if "text_length" in settings else PRIORS)[kind](codebook_size, tuple(grid), **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@torch.no_grad()
def bits_per_index(prior: Prior, indices: Tensor, labels: Tensor | None, *, together: bool = False) -> float:
    """Return the mean of -log2 p over indices (N, *grid), computed on the prior's device.

    `together`: every rank calls this with the same indices, works on a part of them, and gets the whole result.
    """
    count = indices.numel()
    if together:
        indices = every_rank_its_own(indices)
        labels = None if labels is None else every_rank_its_own(labels)
    device = next(prior.parameters()).device
    batch = max(1, min(_BATCH, _LOGITS // (prior.places * max(prior.sizes))))
    parts = labels.split(batch) if labels is not None else [None] * math.ceil(len(indices) / batch)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part, part_labels in zip(indices.split(batch), parts, strict=True):
        on_device = None if part_labels is None else to_device(part_labels, device)
        total += prior.bits(to_device(part, device).long(), on_device).sum()
    if together:
        sum_over_ranks_(total)
    return total.item() / count
