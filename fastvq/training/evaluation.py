"""Reconstruction quality and codebook usage on held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastvq
from fastvq.data.images import to_float
from fastvq.models import VQVAE, NoBottleneck

from .ranks import every_rank_its_own, sum_over_ranks_


@dataclass(frozen=True)
class Evaluation:
    """Measures of one model on one set of images.

    Attributes:
        psnr_db: peak signal-to-noise ratio in dB of the mean squared error over all pixels of all images in [0, 1].
        stage_counts: for each codebook (stage, head, group or scale), the number of times each code is chosen, (K,)
            int64; empty without a bottleneck.
    """

    psnr_db: float
    stage_counts: tuple[Tensor, ...]

    @property
    def counts(self) -> Tensor:
        """The counts of the only codebook, or those of all, one after the other; (0,) without a bottleneck."""
        return torch.cat(self.stage_counts) if self.stage_counts else torch.zeros(0, dtype=torch.int64)

    @property
    def perplexity(self) -> float | None:
        """Exp of the entropy of the indices over all images, averaged over codebooks; None without a bottleneck."""
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


def psnr_db(mean_squared_error: float) -> float:
    """Return `-10 log10(mse)`, the PSNR in dB of signals with peak 1; infinite for an error of zero."""
    return -10 * math.log10(mean_squared_error) if mean_squared_error > 0 else math.inf


@torch.no_grad()
def reconstruct(model: VQVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reconstructions in [0, 1] of float images (B, C, H, W), and the indices they were decoded from.

    The decoder receives only the indices; without a bottleneck it receives the features, and the indices are empty.
    The model runs in eval mode and returns to its previous mode.
    """
    training = model.training
    model.eval()
    try:
        if isinstance(model.bottleneck, NoBottleneck):
            restored, indices, _ = model(images)
        else:
            indices = model.encode(images)
            restored = model.decode(indices)
    finally:
        model.train(training)
    return restored.clamp(0, 1), indices


@torch.no_grad()
def evaluate(model: VQVAE, images: Tensor, *, batch_size: int = 250, together: bool = False) -> Evaluation:
    """Measure a model on uint8 images (N, C, H, W); its mode and its codebook stay unchanged.

    Args:
        model: the model.
        images: the images.
        batch_size: number of images at a time.
        together: every rank calls this with the same images, measures a part of them, and gets the whole result.
    """
    device = next(model.parameters()).device
    adapter = model.adapter
    sizes = () if isinstance(model.bottleneck, NoBottleneck) else adapter.stage_sizes()
    counts = tuple(torch.zeros(size, dtype=torch.int64) for size in sizes)
    error = torch.zeros((), dtype=torch.float64)
    for part in (every_rank_its_own(images) if together else images).split(batch_size):
        originals = to_float(part.to(device))
        restored, indices = reconstruct(model, originals)
        for stage_counts, chosen in zip(counts, adapter.stages(indices.cpu()) if sizes else (), strict=True):
            stage_counts += torch.bincount(chosen.flatten(), minlength=len(stage_counts))
        error += (restored - originals).square().sum(dtype=torch.float64).cpu()
    if together:
        sum_over_ranks_(error, *counts)
    return Evaluation(psnr_db(float(error) / images.numel()), counts)
