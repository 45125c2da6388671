"""Arithmetic of a prior's step: floats for sampling, or exact integers for coding files."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Arithmetic(Protocol):
    """Operations that a prior's step is composed of, on one kind of numbers."""

    def constant(self, parameter: Tensor) -> Tensor:
        """Return a parameter as numbers of this kind, in its shape."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor: ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(D)) v, for queries (..., n, D) and keys and values (..., places, D)."""
        ...

    def multiply(self, x: Tensor, y: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor) -> Tensor: ...

    def tanh(self, x: Tensor) -> Tensor: ...

    def sigmoid(self, x: Tensor) -> Tensor: ...


class Floats:
    """Floating-point arithmetic in the dtype of the parameters."""

    def constant(self, parameter: Tensor) -> Tensor:
        return parameter

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return layer(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def tanh(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)
