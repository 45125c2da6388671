"""What a quantizer asks of its codebook and its vectors beside their distance."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.reference import compute_dtype
from fastvq.functional.quantize import unit_norm


def orthogonality(codes: Tensor, used: Tensor | None = None, *, most: int | None = None) -> Tensor:
    """How far codes are from orthogonal, whatever their lengths: 0 for orthogonal ones.

        loss = |E' E'^T - 1|_F^2 / K^2 = (|E'^T E'|_F^2 - 2 |E'|_F^2 + K) / K^2,   e' = e / |e|

    averaged over codebooks. The second form needs a D x D matrix: nothing here is K x K. For codes that aren't zero it
    is sum_{i,j} (e'_i . e'_j)^2 / K^2 - 1 / K.

    Args:
        codes: (C, K, D), differentiable.
        used: bool (C, K), to take these codes alone; K in the formula is then their number.
        most: take so many random ones of them at most.

    Returns:
        () float32, or float64; 0 where no code is taken.

    Source: Shin, Lee, Lee, Translation-equivariant Image Quantizer for Bi-directional Image-Text Generation, 2021,
    equation 2.
    """
    if used is not None and (used.dtype != torch.bool or used.shape != codes.shape[:-1]):
        raise ValueError(f"used: must be bool {tuple(codes.shape[:-1])}, got {used.dtype} {tuple(used.shape)}")
    if most is not None and most < 1:
        raise ValueError(f"most: must be at least 1, got {most}")
    size = codes.shape[1]
    normed = unit_norm(codes.to(compute_dtype(codes, codes)))
    if most is not None and most < size:
        keys = torch.rand(codes.shape[:-1], device=codes.device)
        if used is not None:
            keys = keys.masked_fill(~used, 2.0)
        chosen = keys.topk(most, dim=-1, largest=False).indices
        normed = normed.gather(1, chosen[..., None].expand(-1, -1, codes.shape[-1]))
        used = None if used is None else used.gather(1, chosen)
        size = most
    if used is None:
        count = normed.new_full((len(codes),), size)
    else:
        normed, count = normed * used[..., None], used.sum(1).to(normed.dtype)
    # Whichever Gram matrix is the smaller: both have the same norm.
    gram = normed.mT @ normed if size > codes.shape[-1] else normed @ normed.mT
    total = gram.square().sum((1, 2)) - 2 * gram.diagonal(dim1=1, dim2=2).sum(1) + count
    return (total / count.square().clamp_min(1)).mean()


def used_codes(indices: Tensor, size: int) -> Tensor:
    """bool (C, K): which codes occur in indices (C, R); -1 is none."""
    used = indices.new_zeros(len(indices), size + 1, dtype=torch.bool)
    return used.scatter_(1, torch.where(indices < 0, size, indices), True)[:, :size]


def squared_errors(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """The mean over D of (x - code)^2 for each index, 0 for -1: x and codes (..., D), indices (...).

    Differentiable in both, in float32 at least.
    """
    dtype = compute_dtype(x, codes)
    absent = indices < 0
    difference = (x.to(dtype) - codes.to(dtype)).masked_fill(absent.unsqueeze(-1), 0)
    return difference.square().mean(-1)
