"""Every quantizer with every option that changes how it computes, small: (how to make it, its dimension)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import fastvq

vq = partial(fastvq.VectorQuantize, 6, 12)
rvq = partial(fastvq.ResidualVQ, dim=6, num_quantizers=3, codebook_size=12)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


QUANTIZERS: dict[str, tuple[partial, int]] = {
    "plain": (vq, 6),
    "straight through": (partial(vq, rotation_trick=False), 6),
    "projected": (partial(vq, codebook_dim=4), 6),
    "cosine": (partial(vq, use_cosine_sim=True), 6),
    "k-means and replacement": (partial(vq, kmeans_init=True, threshold_ema_dead_code=2), 6),
    "learnable": (partial(vq, learnable_codebook=True, ema_update=False), 6),
    "cosine, learnable": (
        partial(vq, use_cosine_sim=True, learnable_codebook=True, commitment_weight=0.25, codebook_weight=1.0),
        6,
    ),
    "heads": (partial(vq, heads=2, codebook_dim=3), 6),
    "separate heads": (partial(vq, heads=2, codebook_dim=3, separate_codebook_per_head=True), 6),
    "affine": (partial(vq, affine_param=True), 6),
    "sampled": (partial(vq, stochastic_sample_codes=True, sample_codebook_temp=0.5), 6),
    "cross entropy": (partial(vq, commitment_use_cross_entropy_loss=True), 6),
    "diversity": (partial(vq, codebook_diversity_loss_weight=0.1), 6),
    "orthogonal": (partial(vq, orthogonal_reg_weight=0.1, orthogonal_reg_active_codes_only=True), 6),
    "DiVeQ": (partial(vq, directional_reparam=True, threshold_ema_dead_code=1), 6),
    "in place": (partial(vq, learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=adam), 6),
    "synchronous": (partial(vq, learnable_codebook=True, ema_update=False, sync_update_v=0.2), 6),
    "layer norm": (partial(vq, codebook_dim=4, layernorm_after_project_in=True), 6),
    "residual": (rvq, 6),
    "residual, k-means and replacement": (partial(rvq, kmeans_init=True, threshold_ema_dead_code=2), 6),
    "residual, dropout": (partial(rvq, num_quantizers=4, quantize_dropout=True, codebook_dim=4), 6),
    "residual, dropout of items": (partial(rvq, quantize_dropout=True, quantize_dropout_per_item=True), 6),
    "residual, one codebook": (partial(rvq, shared_codebook=True), 6),
    "residual, sizes": (partial(fastvq.ResidualVQ, dim=6, codebook_size=(12, 8), codebook_dim=4), 6),
    "residual, cosine": (partial(rvq, use_cosine_sim=True), 6),
    "residual, beam": (partial(rvq, beam_size=2), 6),
    "residual, implicit": (partial(rvq, implicit_neural_codebook=True), 6),
    "residual, implicit, preselected": (partial(rvq, implicit_neural_codebook=True, preselect=4), 6),
    "residual, DiVeQ": (partial(rvq, diveq=True, threshold_ema_dead_code=1), 6),
    "residual, gradient once": (partial(rvq, gradient="once", rotation_trick=False), 6),
    "residual, sampled": (partial(rvq, stochastic_sample_codes=True, sample_codebook_temp=0.5), 6),
    "grouped": (partial(fastvq.GroupedResidualVQ, dim=6, groups=2, num_quantizers=2, codebook_size=8), 6),
    "SimVQ": (partial(fastvq.SimVQ, 6, 12), 6),
    "residual SimVQ": (partial(fastvq.ResidualSimVQ, dim=6, num_quantizers=3, codebook_size=12), 6),
    "Gumbel": (partial(fastvq.GumbelQuantize, 6, 12), 6),
    "Gumbel, hard": (partial(fastvq.GumbelQuantize, 6, 12, logits="distance", hard=True, temperature=0.5), 6),
    "LFQ": (partial(fastvq.LFQ, codebook_size=64, entropy_loss_weight=0.1, commitment_loss_weight=0.2), 6),
    "residual LFQ": (partial(fastvq.ResidualLFQ, dim=6, codebook_size=16, num_quantizers=3), 6),
    "grouped LFQ": (partial(fastvq.GroupedResidualLFQ, dim=6, groups=2, codebook_size=8, num_quantizers=2), 6),
    "FSQ": (partial(fastvq.FSQ, [5, 4, 3], dim=6), 6),
    "FSQ, symmetric": (partial(fastvq.FSQ, [5, 4, 3], dim=6, preserve_symmetry=True, noise_dropout=0.5), 6),
    "residual FSQ": (partial(fastvq.ResidualFSQ, dim=6, levels=[5, 4, 3], num_quantizers=3), 6),
    "grouped FSQ": (partial(fastvq.GroupedResidualFSQ, dim=6, groups=2, levels=[5, 4, 3], num_quantizers=2), 6),
    "iFSQ": (partial(fastvq.IFSQ, [5, 7, 3], dim=6), 6),
    "IBQ": (partial(fastvq.IBQ, 6, 12, entropy_temperature=1.0), 6),
    "LlamaGen": (partial(fastvq.LlamaGenVQ, 6, 12, entropy_loss_weight=0.1, entropy_temperature=1.0), 6),
    "spherical groups": (partial(fastvq.GroupedSphericalVQ, 6, 12, 2), 6),
    "SQ-VAE": (partial(fastvq.StochasticVQ, 6, 12), 6),
    "factorized": (partial(fastvq.FactorizedVQ, 6, 12, 4), 6),
    "factorized, residual": (partial(fastvq.FactorizedResidualVQ, 6, 12, 3, 4, quantize_dropout=True), 6),
    "split": (partial(fastvq.SplitResidualVQ, dim=6, codebook_size=12, num_quantizers=3, codebook_dim=4), 6),
    "FSP": (partial(fastvq.FSP, [5, 4, 3], dim=6), 6),
    "LatentQuantize": (partial(fastvq.LatentQuantize, [5, 4, 3], 6), 6),
    "random projections": (
        partial(fastvq.RandomProjectionQuantizer, dim=6, codebook_size=12, codebook_dim=4, num_codebooks=2),
        6,
    ),
}
"""LatentQuantize takes (B, dim, N), the others (B, N, dim)."""


def batch_for(kind: str, *, rows: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, length, QUANTIZERS[kind][1], generator=torch.Generator().manual_seed(seed))
    return x.transpose(1, 2).contiguous() if kind == "LatentQuantize" else x


def make(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return QUANTIZERS[kind][0]()


def tensors(results: Any) -> list[torch.Tensor]:
    """Return the tensors of nested tuples and dicts, in order."""
    if isinstance(results, torch.Tensor):
        return [results]
    if isinstance(results, dict):
        results = results.values()
    if not isinstance(results, (tuple, list)) and not hasattr(results, "__iter__"):
        return []
    return [tensor for part in results for tensor in tensors(part)]
