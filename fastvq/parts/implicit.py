"""Implicit neural codebooks: codes that depend on what the levels before have coded."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.precision import full_precision

CHUNK_ELEMENTS = 1 << 22
"""Elements of the largest temporary that a search holds: 16 MiB of float32."""


class NeuralCodes(nn.Module):
    """Transforms a code by what was coded so far.

        h_0 = W [condition; code] + b,   h_{i+1} = h_i + W'_i silu(W_i h_i + b_i) + b'_i,   code' = h_depth

    State: proj_in, layers.

    Args:
        dim: D, of codes and condition.
        dim_hidden: width of the residual layers; by default D.
        depth: number of residual layers.
        l2norm_output: return unit vectors.

    Source: Huijben et al., Residual Quantization with Implicit Neural Codebooks (QINCo), 2024, section 3.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)]
        )
        self.l2norm_output = l2norm_output
        self.widest = max(dim, hidden)

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """Codes (..., D), each with its condition (..., D); the leading shapes are broadcast. Computed in the network's
        dtype, autocast or not; returned in that of the codes."""
        with full_precision(codes):
            return self._transform(codes, condition).to(codes.dtype)

    def _transform(self, codes: Tensor, condition: Tensor) -> Tensor:
        weight = self.proj_in.weight
        # Its two halves apart: what is broadcast is only added, not multiplied again.
        of_condition, of_codes = weight.chunk(2, 1)
        h = F.linear(condition.to(weight.dtype), of_condition, self.proj_in.bias)
        h = h + F.linear(codes.to(weight.dtype), of_codes)
        for layer in self.layers:
            h = h + layer(h)
        return F.normalize(h, dim=-1) if self.l2norm_output else h

    def by_rows(self, codes: Tensor, condition: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The transformed codes (n, K, D) of n rows at a time, for codes (K, D) and condition (R, D): with the rows'
        place, and no more of them than fit CHUNK_ELEMENTS. For use without gradient."""
        step = max(1, CHUNK_ELEMENTS // (len(codes) * self.widest))
        for start in range(0, len(condition), step):
            place = slice(start, start + step)
            yield place, self(codes[None], condition=condition[place, None])
