"""What a prior computes with, one place at a time: floats to sample, or exact integers to code files."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Arithmetic(Protocol):
    """Numbers of one kind, and the operations that a prior's step is written in."""

    def constant(self, parameter: Tensor) -> Tensor:
        """A parameter as numbers of this kind, of its shape."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor: ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, of (..., 1, D) queries and (..., places, D) keys and values."""
        ...

    def multiply(self, x: Tensor, y: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor) -> Tensor: ...

    def tanh(self, x: Tensor) -> Tensor: ...

    def sigmoid(self, x: Tensor) -> Tensor: ...


class Floats:
    """The arithmetic of the parameters themselves."""

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
