"""Likelihoods compared with loops over numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fastvq.models import discretized_logistic, elbo_bits_per_dimension

LEVELS = 7


def loop(level: int, mean: float, scale: float) -> float:
    def below(edge: float) -> float:
        return 1 / (1 + math.exp(-(edge / (LEVELS - 1) - mean) / scale))

    upper = 1.0 if level == LEVELS - 1 else below(level + 0.5)
    return -math.log(upper - (0.0 if level == 0 else below(level - 0.5)))


@pytest.mark.parametrize("scale", [0.03, 0.2, 3.0])
@pytest.mark.parametrize("mean", [-0.1, 0.4, 1.0])
def test_each_level_has_the_probability_of_its_interval(mean: float, scale: float) -> None:
    x = torch.arange(LEVELS, dtype=torch.float64) / (LEVELS - 1)
    found = discretized_logistic(x, torch.tensor(mean, dtype=torch.float64), math.log(scale), levels=LEVELS)
    assert float((-found).exp().sum()) == pytest.approx(1)
    for level in range(LEVELS):
        if scale > 0.1:  # beyond it, the difference in the loop has no digits left
            assert float(found[level]) == pytest.approx(loop(level, mean, scale))


def test_far_values_have_finite_gradients() -> None:
    mean, log_scale = torch.zeros(2, requires_grad=True), torch.tensor(-8.0, requires_grad=True)
    nats = discretized_logistic(torch.tensor([0.6, 1.0]), mean, log_scale)
    nats.sum().backward()
    assert nats.isfinite().all()
    assert mean.grad is not None
    assert log_scale.grad is not None
    assert mean.grad.isfinite().all()
    assert log_scale.grad.isfinite().all()


def test_bits_per_dimension() -> None:
    found = elbo_bits_per_dimension(torch.full((2, 1, 3, 4), math.log(2)), torch.tensor([0.0, 6 * math.log(2)]))
    assert found.tolist() == pytest.approx([1.0, 1.5])


def test_one_level_is_refused() -> None:
    with pytest.raises(ValueError, match="levels: must be at least 2, got 1"):
        discretized_logistic(torch.zeros(1), torch.zeros(1), 0.0, levels=1)
