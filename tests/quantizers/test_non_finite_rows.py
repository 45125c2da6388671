"""Rows that are not finite, also before projections and normalizations, are treated as masked."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..contract import assert_non_finite_rows_are_excluded, vectors

DIM, SIZE = 12, 20
VECTOR = {
    "plain": {},
    "projected": {"codebook_dim": 5},
    "cosine": {"use_cosine_sim": True},
    "cosine, projected, normalized": {"use_cosine_sim": True, "codebook_dim": 5, "layernorm_after_project_in": True},
    "heads": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
    "projected heads": {"heads": 2, "codebook_dim": 4},
    "learnable, projected": {"learnable_codebook": True, "codebook_dim": 5},
    "straight through, projected": {"rotation_trick": False, "codebook_dim": 5},
    "DiVeQ, projected": {
        "directional_reparam": True,
        "threshold_ema_dead_code": 1e-9,
        "codebook_dim": 5,
        "directional_reparam_variance": 0.0,
    },
    "cross entropy, projected": {"commitment_use_cross_entropy_loss": True, "codebook_dim": 5},
    "diversity, projected": {"codebook_diversity_loss_weight": 0.1, "codebook_dim": 5},
    "affine, projected": {"affine_param": True, "codebook_dim": 5},
}


@pytest.mark.parametrize("kind", VECTOR)
def test_vector_quantize(kind):
    layer = fastvq.VectorQuantize(DIM, SIZE, **VECTOR[kind])
    assert_non_finite_rows_are_excluded(layer, vectors(3, 9, DIM))


RESIDUAL = {
    "plain": {},
    "projected": {"codebook_dim": 5},
    "cosine": {"use_cosine_sim": True},
    "projected, with gradients between levels": {"codebook_dim": 5, "quant_grad_frac": 0.5},
    "beam, projected": {"codebook_dim": 5, "beam_size": 3},
    "implicit, projected": {"codebook_dim": 5, "implicit_neural_codebook": True},
    "DiVeQ, projected": {"codebook_dim": 5, "diveq": True, "threshold_ema_dead_code": 1e-9},
    "shared, projected": {"codebook_dim": 5, "shared_codebook": True},
}


@pytest.mark.parametrize("kind", RESIDUAL)
def test_residual_vq(kind):
    layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=SIZE, **RESIDUAL[kind])
    assert_non_finite_rows_are_excluded(layer, vectors(3, 9, DIM))


@pytest.mark.parametrize("kind", [{"codebook_dim": 5}, {"use_cosine_sim": True}], ids=str)
def test_a_non_finite_row_under_the_mask(kind):
    """Masked rows may hold anything."""
    layer = fastvq.VectorQuantize(DIM, SIZE, **kind)
    x = vectors(3, 9, DIM)
    x[1, 4] = torch.nan
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 4] = False
    x.requires_grad_()
    quantized, _, loss = layer(x, mask=mask)
    (quantized.square().sum() + loss).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
