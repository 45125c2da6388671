"""Reconstruction quality and codebook usage on held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fastvq
from fastvq.data.images import to_float
from fastvq.models import VQVAE, NoBottleneck


@dataclass(frozen=True)
class Evaluation:
    """Measures of one model on one set of images.

    Attributes:
        psnr_db: peak signal-to-noise ratio in dB of the mean squared error over all pixels of all images in [0, 1].
        perplexity: exp of the entropy of the indices over all images; None without a bottleneck.
        usage: share of codes that are chosen at least once; None without a bottleneck.
        counts: (K,), int64, number of times each code is chosen; (0,) without a bottleneck.
    """

    psnr_db: float
    perplexity: float | None
    usage: float | None
    counts: Tensor


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
def evaluate(model: VQVAE, images: Tensor, *, batch_size: int = 250) -> Evaluation:
    """Measure a model on uint8 images (N, C, H, W); its mode and its codebook stay unchanged."""
    device = next(model.parameters()).device
    quantizer = model.bottleneck if isinstance(model.bottleneck, fastvq.VectorQuantize) else None
    codebook_size = 0 if quantizer is None else len(quantizer.codebook)
    counts = torch.zeros(codebook_size, dtype=torch.int64)
    squared_error = 0.0
    for part in images.split(batch_size):
        originals = to_float(part.to(device))
        restored, indices = reconstruct(model, originals)
        counts += torch.bincount(indices.flatten().cpu(), minlength=codebook_size)
        squared_error += float((restored - originals).square().sum(dtype=torch.float64))
    return Evaluation(
        psnr_db=psnr_db(squared_error / images.numel()),
        perplexity=None if quantizer is None else float(fastvq.perplexity(counts)),
        usage=None if quantizer is None else float(fastvq.usage(counts)),
        counts=counts,
    )
