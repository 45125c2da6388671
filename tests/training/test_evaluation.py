"""Evaluation: PSNR, perplexity and usage over all held-out images."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastvq.modalities.image import PixelObjective, psnr_db
from fastvq.training import build_model, evaluate
from fastvq.training.evaluation import reconstruct

from .tiny import TINY, tiny_images


def test_psnr() -> None:
    assert psnr_db(0.01) == pytest.approx(20)
    assert psnr_db(1.0) == 0
    assert psnr_db(0.0) == math.inf


def test_evaluation_is_of_all_pixels_and_all_codes_whatever_the_batches() -> None:
    torch.manual_seed(1)
    model = build_model(TINY)
    images = tiny_images().train
    x = images.float() / 255
    model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluate(model, images, PixelObjective(1.0), batch_size=7)

    assert model.training
    assert model.bottleneck.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    restored, indices = reconstruct(model, x)
    assert result.psnr_db == pytest.approx(psnr_db((restored - x).square().mean().item()), abs=1e-4)
    assert torch.equal(result.counts, torch.bincount(indices.flatten(), minlength=16))
    share = result.counts[result.counts > 0] / result.counts.sum()
    assert result.perplexity == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-5)
    assert result.usage == pytest.approx((result.counts > 0).float().mean().item())
    assert restored.min() >= 0
    assert restored.max() <= 1


def test_the_ceiling_has_no_codes() -> None:
    result = evaluate(
        build_model(dataclasses.replace(TINY, bottleneck="none")), tiny_images().test, PixelObjective(1.0)
    )
    assert (result.perplexity, result.usage, result.counts.numel()) == (None, None, 0)
    assert 0 < result.psnr_db < 20
