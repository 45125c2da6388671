"""Extreme magnitudes in the kernels of the backward pass and of the averages: tests/ops/test_extremes.py on Triton."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.kernels.ema_update import ema_update_
from fastvq.kernels.quantize import quantize_backward

from ..cases import ADVERSARIAL, generator
from ..ops.test_extremes import EXTREME, OPPOSITE, held, nearly_opposite

LONG = ("largest_vectors", "opposite_extremes", "huge_vectors_tiny_codes", "values_of_1e_38")


@pytest.mark.parametrize(("data", "dim"), [*((data, 16) for data in EXTREME), *((data, 1100) for data in LONG)])
def test_gradients(data, dim, device):
    """Rows that a program holds whole, and longer ones."""
    x, codes = ADVERSARIAL[data](9, 5, dim, generator())
    indices = reference.search(x, codes)
    chosen = codes[indices.clamp_min(0)].masked_fill((indices < 0)[:, None], 0)
    grad = torch.randn(x.shape, generator=generator(1))
    for gradient, weight in (("ste", 0.25), ("rotation", 0.0), ("rotation", 0.25)):
        options = {"gradient": gradient, "commitment_weight": weight}
        arguments = (x, chosen, indices, grad, torch.ones(()))
        actual = quantize_backward(*(t.to(device) for t in arguments), **options).cpu()
        assert not held(actual, reference.quantize_backward(*arguments, **options), close=True), options


@pytest.mark.parametrize("scale", [1.0, 1e-5, 2.0**60])
@pytest.mark.parametrize(("turn", "dim"), [*OPPOSITE, (0.0, 1100), (1e-6, 1100), (1e-3, 1100)])
def test_rotation_gradient_of_opposite_vectors(turn, dim, scale, device):
    """Vectors are short, or so long that float32 holds their squares but not the sum of these."""
    x, codes, grad = nearly_opposite(turn, dim)
    arguments = (scale * x, scale * codes, torch.arange(20), grad, torch.zeros(()))
    options = {"gradient": "rotation", "commitment_weight": 0.0}
    actual = quantize_backward(*(t.to(device) for t in arguments), **options).cpu()
    expected = reference.quantize_backward(*arguments, **options)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("decay", [0.3, 1.0])
@pytest.mark.parametrize("data", EXTREME)
def test_averages(data, decay, device):
    _, codes = ADVERSARIAL[data](9, 5, 16, generator())
    sizes, counts = (torch.rand(2, 5, generator=generator(1)) + 0.5).unbind()
    for weight in (None, torch.rand(5, generator=generator(2))):
        states = [(codes.clone(), sizes.clone(), codes.clone()) for _ in range(2)]
        options = {"decay": decay, "eps": 1e-5}
        on = [t.to(device) for t in states[0]]
        given = [t.to(device) for t in (counts, -codes)]
        ema_update_(*on, *given, **options, weight=None if weight is None else weight.to(device))
        reference.ema_update_(*states[1], counts, -codes, **options, weight=weight)
        for actual, expected in zip(on, states[1], strict=True):
            assert not held(actual.cpu(), expected, close=True)
