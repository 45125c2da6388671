"""Soft assignment to all vectors of signs, as a differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvq.ops import binary_assign_backward, binary_assign_forward
from fastvq.precision import at_least_float32, may_change


class BinaryAssignment(NamedTuple):
    """Result of `binary_assign`."""

    entropy: Tensor  # (R,) or (G, R)
    mean: Tensor  # (K,) or (G, K), K = 2^D


def binary_assign(
    x: Tensor, *, scale: float | Tensor = 1.0, floor: float = 0.0, mask: Tensor | None = None
) -> BinaryAssignment:
    """Return the entropy of each vector's distribution over the 2^D vectors of signs, and the mean distribution.

        p_nk = softmax_k(scale <x_n, b_k>),   b_k in {-1, 1}^D,   bit D-1-j of k is set where b_kj = 1
        entropy_n = -sum_k p_nk ln max(p_nk, floor),   mean_k = mean over n of p_nk

    Dimension 0 is thus the most significant bit of k, as in LFQ. Both results are differentiable.

    Args:
        x: (R, D), or (G, R, D) for means within each group; any floating dtype, D up to 30.
        scale: factor of the products, not negative, a number or a tensor (). LFQ's is 2 inv_temperature
            codebook_scale: its codes are +-codebook_scale, its distance -2 <x, code>.
        floor: smallest probability whose logarithm is taken, in [0, 1); LFQ's is 1e-5, 0 gives the exact entropy. A
            compiled graph is made for one: it must not change at each step.
        mask: bool (R,) or (G, R), True for the rows that take part.

    Returns:
        entropy (R,) or (G, R) in nats, and mean (K,) or (G, K); float32, or float64 for float64 x. A row that is masked
        out or non-finite has entropy 0, no part in the mean and no gradient. If all rows are excluded, the mean is 0.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Numerics: docs/streams.md. The distribution is a product over the bits, so that the mean costs one product of
    matrices (2^(D/2), R) and (R, 2^(D/2)). Memory is O(R D + K) and a tile; the R x K matrix is never materialized.

    Source: Yu et al., Language Model Beats Diffusion (MAGVIT-v2), 2023, equation 5; Zhao et al., Image and Video
    Tokenization with Binary Spherical Quantization, 2024, for the product.
    """
    if may_change(scale):  # a tensor would be read, and a changing number be compiled anew
        x, scale = at_least_float32(x) * scale, 1.0
    if x.dim() == 2:
        entropy, mean = _BinaryAssign.apply(x[None], None if mask is None else mask[None], scale, floor)
        return BinaryAssignment(entropy[0], mean[0])
    return BinaryAssignment(*_BinaryAssign.apply(x, mask, scale, floor))


class _BinaryAssign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scale: float, floor: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mask)
        ctx.scale, ctx.floor = float(scale), float(floor)
        ctx.set_materialize_grads(False)
        return binary_assign_forward(x, mask, scale=ctx.scale, floor=ctx.floor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, entropy_grad: Tensor | None, mean_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask = ctx.saved_tensors
        x_grad = binary_assign_backward(x, mask, entropy_grad, mean_grad, scale=ctx.scale, floor=ctx.floor)
        return x_grad.to(x.dtype), None, None, None
