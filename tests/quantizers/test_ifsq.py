"""iFSQ against its formula."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator


def test_codes_and_gradients_are_those_of_the_formula():
    levels = [5, 9, 3]
    quantizer = fastvq.IFSQ(levels)
    z = 2 * torch.randn(500, 3, generator=generator(), dtype=torch.float64)
    z.requires_grad_()
    quantized, indices = quantizer(z[None])
    half = (torch.tensor(levels, dtype=torch.float64) - 1) / 2
    bounded = 2 * torch.sigmoid(1.6 * z) - 1
    close(quantized[0].detach(), ((half * bounded).round() / half).detach())
    quantized.square().sum().backward()
    (expected,) = torch.autograd.grad(bounded, z, 2 * quantized[0].detach())
    close(z.grad, expected)
    assert torch.equal(quantizer.indices_to_codes(indices).double(), quantized)


def test_standard_normal_coordinates_use_the_levels_evenly():
    """The inner levels of 15 are used within a quarter of equally often, those of FSQ's tanh are not."""
    z = torch.randn(1, 100_000, 1, generator=generator())
    shares = {}
    for make in (fastvq.IFSQ, lambda levels: fastvq.FSQ(levels, preserve_symmetry=True)):
        indices = make([15])(z)[1]
        inner = torch.bincount(indices.flatten().long(), minlength=15)[1:-1].float()
        shares[make] = float(inner.max() / inner.min())
    ifsq, fsq = shares.values()
    assert ifsq < 1.35 < fsq


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": [4, 3]}, ValueError, "levels: must be odd"),
        ({"levels": [5], "bound_hard_clamp": True}, TypeError, "bound_hard_clamp: is not an argument"),
        ({"levels": [5], "unheard_of": 1}, TypeError, ".*unheard_of"),
    ],
)
def test_refuses_by_name(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastvq.IFSQ(**options)
