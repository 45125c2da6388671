"""What stands before a binary code: soft clamp, sphere, cosine projection, random rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvq.functional.quantize import unit_norm


def soft_clamp(x: Tensor, limit: float | Tensor) -> Tensor:
    """limit tanh(x / limit): x near zero, never beyond -limit and limit, with a gradient everywhere."""
    return (x / limit).tanh() * limit


def on_sphere(x: Tensor, radius: float) -> Tensor:
    """x, stretched to a length of `radius` along the last dimension; shorter than 1e-6 it stays near zero.

    Source: Zhao et al., Image and Video Tokenization with Binary Spherical Quantization, 2024, section 4.1.
    """
    return unit_norm(x) * radius


def random_rotation(dim: int) -> Tensor:
    """A random orthogonal matrix (dim, dim), float32, by torch's generator.

        y = x R,   x = y R^T

    Bits of y take part in all directions of x, so that no bit lies idle while another decides everything.

    Source: Chee et al., QuIP: 2-Bit Quantization of Large Language Models With Guarantees, 2023, section 3.2.
    """
    return nn.init.orthogonal_(torch.empty(dim, dim))


class CosineSimLinear(nn.Module):
    """scale times the cosines between x (..., dim_in) and the columns of a weight (dim_in, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return (unit_norm(x) @ unit_norm(self.weight.T).T) * self.scale
