"""Balanced assignment: every code gets about the same number of vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype
from fastvq.functional.quantize import rows_of_mask
from fastvq.functional.soft_assign import soft_assign
from fastvq.ops import search

from .arguments import check_positive, check_sizes
from .losses import mean_over_ranks


class BalancedAssignment(NamedTuple):
    """Result of `balanced_assignment`."""

    indices: Tensor  # (...) int64, -1 for excluded rows
    bias: Tensor  # (K,), what is added to the score of each code
    imbalance: Tensor  # (), the largest |K m_k - 1| of the soft assignment that the bias gives


@torch.no_grad()
def balanced_assignment(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    temperature: float = 0.05,
    iterations: int = 50,
    mask: Tensor | None = None,
) -> BalancedAssignment:
    """Assign vectors to codes so that the codes are used about equally, by Sinkhorn's algorithm in the log domain.

        p_nk = softmax_k((s_nk + b_k) / temperature),   m_k = mean_n p_nk,   s_nk = -|x_n - e_k|^2 or <x_n, e_k>
        b_k <- b_k - temperature ln(K m_k),  repeated;   index_n = argmax_k s_nk + b_k

    Each iteration normalizes rows, then columns. The soft assignment converges to one with m_k = 1 / K; that of the
    indices is close to it for a small temperature.

    Args:
        x: (..., D), any floating dtype. codebook: (K, D).
        metric: "l2" or "dot": s.
        temperature: entropic regularization, in the unit of s; smaller ones need more iterations.
        iterations: number of updates of b.
        mask: bool (...), the vectors that take part, if they are finite.

    With several processes, m is that of all their vectors. Memory is O(N D + K D) and a tile: there is no N x K matrix
    (`fastvq.soft_assign`). Scores are computed in float32, or float64 if an argument is; the last search is exact for
    codes with b_k - |e_k|^2 as one more coordinate.

    Raises:
        TypeError, ValueError: an invalid argument, by name.

    Source: Cuturi, Sinkhorn Distances, 2013; Asano et al., Self-labelling via Simultaneous Clustering and
    Representation Learning, 2020 (equal use of labels).
    """
    check_sizes(iterations=iterations)
    if metric not in ("l2", "dot"):
        raise ValueError(f"metric: must be l2 or dot, got {metric!r}")
    check_positive(temperature=temperature)
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: must be floating point, got {tensor.dtype}")
    if codebook.dim() != 2 or x.dim() < 1 or x.shape[-1] != codebook.shape[1] or not len(codebook):
        raise ValueError(
            f"x, codebook: must have shapes (..., D) and (K, D), got {tuple(x.shape)} and {tuple(codebook.shape)}"
        )
    rows = x.reshape(-1, x.shape[-1])
    rows_mask = rows.isfinite().all(1)
    if mask is not None:
        rows_mask = rows_mask & rows_of_mask(mask, x.shape[:-1])
    wide = compute_dtype(x, codebook)
    codes = codebook.to(wide)
    # Without |x|^2, which all codes share, the score is a product: the bias is then the code's last coordinate.
    offset = codes.new_zeros(len(codes)) if metric == "dot" else -codes.square().sum(1)
    scale = 1.0 if metric == "dot" else 2.0
    rows = torch.cat([scale * rows.to(wide), torch.ones_like(rows[:, :1], dtype=wide)], 1)
    count, bias = rows_mask.sum().to(wide), torch.zeros_like(offset)
    size = len(codes)

    def mean(bias: Tensor) -> Tensor:
        table = torch.cat([codes, (offset + bias)[:, None]], 1)
        found = soft_assign(rows, table, metric="dot", scale=1 / temperature, mask=rows_mask).mean
        return mean_over_ranks(found, count)

    for _ in range(iterations):
        bias = bias - temperature * (size * mean(bias)).clamp_min(torch.finfo(wide).tiny).log()
        bias = bias - bias.mean()
    imbalance = (size * mean(bias) - 1).abs().amax()
    table = torch.cat([codes, (offset + bias)[:, None]], 1)
    indices = search(rows, table, metric="dot", mask=rows_mask)
    return BalancedAssignment(indices.view(x.shape[:-1]), bias, imbalance)
