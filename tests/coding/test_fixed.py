"""Fixed-point arithmetic: close to floats, and exact in any order of summation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastvq.coding import tables
from fastvq.coding.fixed import ONE, Fixed, _floor_divide, _floor_sqrt, exponentials
from fastvq.errors import CodingError
from fastvq.models.priors.arithmetic import Floats

from ..cases import generator


def units(x):
    return (x.double() * ONE).round()


def near(fixed, floats, atol=1e-4):
    assert torch.equal(fixed, fixed.round())
    torch.testing.assert_close(fixed / ONE, floats.double(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", ["gelu", "tanh", "sigmoid"])
def test_curves(name):
    x = torch.linspace(-12, 12, 5001, dtype=torch.float64)
    near(getattr(Fixed(), name)(units(x)), getattr(Floats(), name)(x), atol=3e-5 if name == "gelu" else 4e-4)
    table = tables.curve(name)
    exact = getattr(Floats(), name)(torch.arange(-2048, 2049, dtype=torch.float64) / 256)
    assert (table.double() / 2**24 - exact).abs().max() < 2**-24


def test_exponentials():
    x = torch.cat([torch.linspace(-30, 3, 1000), torch.tensor([-math.inf])]).double()
    result = exponentials(units(x.clamp_min(-200))).double() / 2**30
    torch.testing.assert_close(result, (x - 3).exp(), rtol=0, atol=2e-5)


def test_layers_are_close_to_floats():
    g = generator()
    fixed, floats = Fixed(), Floats()
    linear, norm = torch.nn.Linear(48, 20), torch.nn.LayerNorm(48)
    torch.nn.init.normal_(norm.weight, generator=g)
    torch.nn.init.normal_(norm.bias, generator=g)
    x = torch.randn(7, 48, generator=g) * torch.logspace(-2, 1, 7)[:, None]
    near(fixed.linear(units(x), linear.weight, linear.bias), floats.linear(x, linear.weight, linear.bias), 2e-3)
    near(fixed.linear(units(x), linear.weight, None), F.linear(x, linear.weight), 2e-3)
    near(fixed.norm(units(x), norm), floats.norm(x, norm), atol=2e-2)  # the first rows are hardly more than rounding
    near(fixed.norm(units(x[3:]), norm), floats.norm(x[3:], norm), atol=1e-3)
    q, k, v = (torch.randn(3, 2, places, 8, generator=g) for places in (1, 9, 9))
    near(fixed.attend(units(q), units(k), units(v)), floats.attend(q, k, v))
    near(fixed.multiply(units(x), units(x.flip(0))), x * x.flip(0), 1e-3)


def test_sums_are_exact_in_any_order():
    """With the largest operands: a matrix product in float64, compared with Python's integers."""
    g = generator()
    weight = torch.randint(-7, 8, (5, 500), generator=g).float() + torch.rand(5, 500, generator=g)
    x = torch.where(torch.rand(4, 500, generator=g) < 0.5, -(2.0**24), 2.0**24 - 1).double()
    result = Fixed().linear(x, weight, None)
    order = torch.randperm(500, generator=g)
    assert torch.equal(Fixed().linear(x[:, order], weight[:, order], None), result)
    rows = (weight.double() * ONE).round().long().tolist()
    for i, row in enumerate(x.long().tolist()):
        for j, column in enumerate(rows):
            total = sum(a * b for a, b in zip(row, column, strict=True))
            assert int(result[i, j]) == (total + (1 << 15)) >> 16


def test_operands_beyond_the_bounds_are_clamped():
    """Operands are clamped to +-256, queries, keys and values to +-64."""
    g, fixed = generator(), Fixed()
    wide = units(torch.tensor([[300.0, -1000.0, 3.0, 5e4], [-257.0, 256.0, 0.5, -1e9]]))
    within = wide.clamp(-(2.0**24), 2.0**24)
    linear, norm = torch.nn.Linear(4, 3), torch.nn.LayerNorm(4)
    assert torch.equal(fixed.linear(wide, linear.weight, linear.bias), fixed.linear(within, linear.weight, linear.bias))
    near(fixed.linear(wide, linear.weight, linear.bias), linear(within.float() / ONE), 2e-2)
    assert torch.equal(fixed.norm(wide, norm), fixed.norm(within, norm))
    near(fixed.norm(wide, norm), norm(within.float() / ONE), 1e-3)
    ones = units(torch.tensor(1.0)).expand(2, 4)
    assert torch.equal(fixed.multiply(wide, ones), within)
    assert torch.equal(fixed.multiply(ones, wide), within)
    # Small beside large, so that scores differ by little and every place has a weight.
    small, large = 0.01 * torch.randn(2, 5, 8, generator=g), 200 * torch.randn(2, 5, 8, generator=g)
    values = torch.randn(2, 5, 8, generator=g)
    for q, k, v in ((large, small, values), (small, large, values), (small, small, large)):
        bounded = [x.clamp(-64, 64) for x in (q, k, v)]
        result = fixed.attend(*(units(x) for x in (q, k, v)))
        assert torch.equal(result, fixed.attend(*(units(x) for x in bounded)))
        near(result, Floats().attend(*bounded), 2e-2)


def test_quotients_and_roots_are_the_exact_floor():
    g = generator()
    x = torch.randint(-(2**52), 2**52, (5000,), generator=g)
    by = torch.randint(1, 2**20, (5000,), generator=g)
    x = torch.cat([x, by * 12345, by * 12345 - 1, -by * 7])
    by = by.repeat(4)
    assert torch.equal(_floor_divide(x.double(), by.double()).long(), x.div(by, rounding_mode="floor"))
    values = torch.cat([torch.randint(0, 2**62, (3000,), generator=g), torch.arange(1 << 30, (1 << 30) + 500) ** 2])
    values = torch.cat([values, values[3000:] - 1, torch.arange(50)])
    assert _floor_sqrt(values).tolist() == [math.isqrt(value) for value in values.tolist()]


def test_inexact_weights_are_refused():
    x = torch.zeros(1, 4, dtype=torch.float64)
    for value, message in (
        (math.nan, "finite"),
        (math.inf, "finite"),
        (1e5, "65536"),
        (3000.0, "at most 4096"),
    ):
        with pytest.raises(CodingError, match=message):
            Fixed().linear(x, torch.full((2, 4), value), None)
    with pytest.raises(CodingError, match="widths up to 4096, got 5000"):
        Fixed().norm(torch.zeros(1, 5000).double(), torch.nn.LayerNorm(5000))
    with pytest.raises(CodingError, match="heads of 256, got 1 and 300"):
        Fixed().attend(*torch.zeros(3, 1, 1, 1, 300).double())
