"""Monotone functions from the real line to an interval: what a scalar quantizer bounds its latents by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Squash(NamedTuple):
    """A monotone function with its inverse and its derivative.

    `slope(z, value)` is d value / d z, from z and value = apply(z). All work on tensors of any floating dtype.
    """

    apply: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def clamp(z: Tensor) -> Tensor:
    """z, kept in [-1, 1]."""
    return z.clamp(-1, 1)


def tanh_act(z: Tensor) -> Tensor:
    """(1 + tanh z) / 2."""
    return (torch.tanh(z) + 1) / 2


def tanh_inv_act(p: Tensor) -> Tensor:
    return torch.arctanh(2 * p - 1)


def sigmoid_act(z: Tensor) -> Tensor:
    """1 / (1 + exp(-z)): the logistic distribution."""
    return torch.sigmoid(z)


def sigmoid_inv_act(p: Tensor) -> Tensor:
    return torch.logit(p)


def normal_act(z: Tensor) -> Tensor:
    """(1 + erf(z / sqrt 2)) / 2."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def normal_inv_act(p: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * p - 1)


def laplace_act(z: Tensor) -> Tensor:
    """exp(z) / 2 below zero, 1 - exp(-z) / 2 from there on; differentiable at zero too."""
    return torch.where(z < 0, z.clamp_max(0).exp() / 2, 1 - (-z.clamp_min(0)).exp() / 2)


def laplace_inv_act(p: Tensor) -> Tensor:
    return torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log())


def cauchy_act(z: Tensor) -> Tensor:
    """1/2 + arctan(z) / pi."""
    return torch.arctan(z) / math.pi + 0.5


def cauchy_inv_act(p: Tensor) -> Tensor:
    return torch.tan(math.pi * (p - 0.5))


SYMMETRIC = {
    "tanh": Squash(torch.tanh, torch.arctanh, lambda z, value: 1 - value * value),
    "clamp": Squash(clamp, lambda value: value, lambda z, value: (z.abs() <= 1).to(z.dtype)),
}
"""To [-1, 1]."""

CUMULATIVE = {
    "tanh": Squash(tanh_act, tanh_inv_act, lambda z, p: 2 * p * (1 - p)),
    "sigmoid": Squash(sigmoid_act, sigmoid_inv_act, lambda z, p: p * (1 - p)),
    "normal": Squash(normal_act, normal_inv_act, lambda z, p: (-z * z / 2).exp() / math.sqrt(2 * math.pi)),
    "laplace": Squash(laplace_act, laplace_inv_act, lambda z, p: (-z.abs()).exp() / 2),
    "cauchy": Squash(cauchy_act, cauchy_inv_act, lambda z, p: 1 / (math.pi * (1 + z * z))),
}
"""To [0, 1]: cumulative distribution functions."""
