"""Transformations before a binary code: soft clamp, sphere, random rotation, cosine projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvq.functional.quantize import unit_norm


def soft_clamp(x: Tensor, limit: float | Tensor) -> Tensor:
    """Return limit tanh(x / limit): about x near zero, within +-limit, with a nonzero gradient everywhere."""
    return (x / limit).tanh() * limit


def on_sphere(x: Tensor, radius: float) -> Tensor:
    """Return x rescaled to length `radius` along the last dimension; vectors shorter than 1e-6 stay near zero.

    Source: Zhao et al., Image and Video Tokenization with Binary Spherical Quantization, 2024, section 4.1.
    """
    return unit_norm(x) * radius


def random_rotation(dim: int) -> Tensor:
    """Return a random orthogonal matrix (dim, dim), float32, drawn from torch's generator.

        y = x R,   x = y R^T

    Each bit of y depends on all directions of x, so that the information is spread evenly over the bits.

    Source: Chee et al., QuIP: 2-Bit Quantization of Large Language Models With Guarantees, 2023, section 3.2.
    """
    return nn.init.orthogonal_(torch.empty(dim, dim))


class CosineSimLinear(nn.Module):
    """Projection to `scale` times the cosines between x (..., dim_in) and the columns of a weight (dim_in, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return (unit_norm(x) @ unit_norm(self.weight.T).T) * self.scale
