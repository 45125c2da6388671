"""Bottlenecks without indices: moments, divergence, samples, schedules."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastvq.errors import ConfigError
from fastvq.models import GaussianBottleneck, NoBottleneck
from fastvq.models.bottlenecks import build_bottleneck

from ..cases import close


def test_the_loss_is_the_divergence_from_the_standard_normal_distribution() -> None:
    torch.manual_seed(0)
    bottleneck = GaussianBottleneck(4, latent_dim=3, kl_weight=0.5)
    x = torch.randn(2, 5, 4)
    mean, log_variance = bottleneck.moments(x)
    divergences = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    close(bottleneck.divergences(x).detach(), divergences.detach())
    close(bottleneck(x)[2].detach(), 0.5 * divergences.sum(-1).mean().detach())


def test_samples_have_the_moments_and_eval_has_the_mean() -> None:
    torch.manual_seed(0)
    bottleneck = GaussianBottleneck(2)
    x = torch.tensor([0.5, -1.0])
    mean, log_variance = bottleneck.moments(x)
    codes, indices, _ = bottleneck(x.expand(1, 40_000, 2))
    assert indices.shape == (1, 40_000, 0)
    torch.testing.assert_close(codes[0].mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(codes[0].std(0), (log_variance / 2).exp(), atol=0.03, rtol=0)
    codes, _, loss = bottleneck.eval()(x[None, None])
    close(codes[0, 0].detach(), mean.detach())
    assert not loss


def test_extreme_features_and_no_vectors() -> None:
    bottleneck = GaussianBottleneck(2, kl_weight=1.0)
    x = torch.full((1, 3, 2), 1e6, requires_grad=True)
    codes, _, loss = bottleneck(x)
    (codes.sum() + loss).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert float(bottleneck(torch.zeros(1, 0, 2))[2].detach()) == 0


def test_schedule_and_arguments() -> None:
    bottleneck = GaussianBottleneck(2, kl_weight=0.0, final_kl_weight=1.0)
    bottleneck.anneal_(0.25)
    assert float(bottleneck.half().kl_weight) == 0.25
    with pytest.raises(ValueError, match="latent_dim: must be an integer of at least 1, got 0"):
        GaussianBottleneck(2, latent_dim=0)
    with pytest.raises(ValueError, match="kl_weight: must not be negative, got -1"):
        GaussianBottleneck(2, kl_weight=-1)


def test_a_narrow_autoencoder() -> None:
    bottleneck = NoBottleneck(4, latent_dim=2)
    x = torch.randn(2, 5, 4)
    codes, indices, loss = bottleneck(x)
    assert torch.equal(codes, bottleneck.features(bottleneck.latents(x)))
    assert (bottleneck.latents(x).shape, indices.shape, float(loss)) == ((2, 5, 2), (2, 5, 0), 0.0)
    assert not NoBottleneck().state_dict()
    with pytest.raises(ConfigError, match="latent_dim: must be an integer of at least 1, got 0"):
        build_bottleneck("none", 4, (1,), {}, {"latent_dim": 0})
