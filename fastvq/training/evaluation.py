"""Reconstruction quality and codebook usage on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastvq
from fastvq.data.examples import to_float
from fastvq.modalities.base import Objective
from fastvq.models import VQVAE, Continuous

from .ranks import every_rank_its_own, sum_over_ranks_


@dataclass(frozen=True)
class Evaluation:
    """Measures of one model on one set of examples.

    Attributes:
        measure: name of the measure of reconstructions, such as "psnr_db"; see `fastvq.modalities.base.Objective`.
        value: its value for all examples.
        stage_counts: for each codebook (stage, head, group or scale), the number of times each code is chosen, (K,)
            int64; empty without a bottleneck.
    """

    measure: str
    value: float
    stage_counts: tuple[Tensor, ...]

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio in dB of the mean squared error over all values of all examples.

        Raises:
            AttributeError: another measure was taken.
        """
        if self.measure != "psnr_db":
            raise AttributeError(f"psnr_db: the reconstructions were judged by {self.measure}")
        return self.value

    @property
    def counts(self) -> Tensor:
        """The counts of the only codebook, or those of all, one after the other; (0,) without a bottleneck."""
        return torch.cat(self.stage_counts) if self.stage_counts else torch.zeros(0, dtype=torch.int64)

    @property
    def perplexity(self) -> float | None:
        """Exp of the entropy of the indices over all examples, averaged over codebooks; None without a bottleneck."""
        return _mean([float(fastvq.perplexity(counts)) for counts in self.stage_counts])

    @property
    def usage(self) -> float | None:
        """Share of codes chosen at least once, averaged over codebooks; None without a bottleneck."""
        return _mean([float(fastvq.usage(counts)) for counts in self.stage_counts])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def usage_record(stage_counts: Sequence[Tensor]) -> dict[str, float | None]:
    """Return perplexity and usage for a record of metrics.jsonl, from the counts (K,) of each codebook.

    Several codebooks have their averages, and their own as `perplexity_1`, `usage_1` ...
    """
    measures = {
        "perplexity": [float(fastvq.perplexity(counts)) for counts in stage_counts],
        "usage": [float(fastvq.usage(counts)) for counts in stage_counts],
    }
    record = {name: _mean(values) for name, values in measures.items()}
    if len(stage_counts) > 1:
        record |= {f"{name}_{n}": value for name, values in measures.items() for n, value in enumerate(values, 1)}
    return record


@torch.no_grad()
def reconstruct(model: VQVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reconstructions of signals (B, C, *size) in their range, and the indices they were decoded from.

    The decoder receives only the indices; without a bottleneck it receives the features, and the indices are empty.
    The model runs in eval mode and returns to its previous mode.
    """
    training = model.training
    model.eval()
    try:
        if isinstance(model.bottleneck, Continuous):
            restored, indices, _ = model(x)
            restored = restored.clamp(*model.value_range)
        else:
            indices = model.encode(x)
            restored = model.restore(indices)
    finally:
        model.train(training)
    return restored, indices


@torch.no_grad()
def evaluate(
    model: VQVAE, stored: Tensor, objective: Objective, *, batch_size: int = 250, together: bool = False
) -> Evaluation:
    """Measure a model on stored examples (N, C, *size); its mode and its codebook stay unchanged.

    Args:
        model: the model.
        stored: the examples.
        objective: what judges reconstructions.
        batch_size: number of examples at a time.
        together: every rank calls this with the same examples, measures a part of them, and gets the whole result.
    """
    device = next(model.parameters()).device
    adapter = model.adapter
    sizes = () if isinstance(model.bottleneck, Continuous) else adapter.stage_sizes()
    counts = tuple(torch.zeros(size, dtype=torch.int64) for size in sizes)
    error = torch.zeros((), dtype=torch.float64)
    for part in (every_rank_its_own(stored) if together else stored).split(batch_size):
        originals = to_float(part.to(device))
        restored, indices = reconstruct(model, originals)
        for stage_counts, chosen in zip(counts, adapter.stages(indices.cpu()) if sizes else (), strict=True):
            stage_counts += torch.bincount(chosen.flatten(), minlength=len(stage_counts))
        error += objective.errors(restored, originals).sum().cpu()
    if together:
        sum_over_ranks_(error, *counts)
    return Evaluation(objective.measure, objective.value(float(error) / len(stored)), counts)
