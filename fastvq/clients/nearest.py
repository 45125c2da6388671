"""Exact nearest codes in the form in which the argmin of a client returns them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq.ops import accumulate, residual_search, search


def nearest(rows: Tensor, codes: Tensor, *, metric: str = "l2") -> Tensor:
    """Return the index of the nearest code of each row, without gradient; 0 for non-finite rows.

    Clients look the index up, which fails for -1. For a row with NaN, argmin gives 0 as well.

    Args:
        rows: (N, D). codes: (K, D). metric: as for `fastvq.search`.

    Returns:
        int64 (N,).
    """
    return search(rows.detach(), codes.detach(), metric=metric, missing=0)


def nearest_while_learning(rows: Tensor, codes: Tensor) -> Tensor:
    """Return what `nearest` returns, fast also where moving averages have made codes very long.

    Where a project divides by the smoothed size of a cluster that never had a vector, the code becomes as long as 1e5
    others. Such codes would cost every search its precision. A code longer than 2 max|x| + min|e| is nearest to no row:
    it is passed as infinite, and thus never chosen.
    """
    lengths = torch.linalg.vector_norm(codes.detach(), dim=1, dtype=torch.float64)
    reach = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64)
    reach = 2 * reach.nan_to_num(0, posinf=0).amax(0) if len(reach) else reach.new_zeros(())
    far = lengths > (reach + lengths.amin()) * (1 + 1e-6)
    return nearest(rows, codes.detach().masked_fill(far[:, None], torch.inf))


def residual_nearest(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Return the indices of all stages for channel-first vectors; 0 for non-finite vectors.

    Args:
        x: (B, D, T). codebooks: Q tensors (K, D) of one dtype, read where they are.

    Returns:
        int64 (Q, B, T), contiguous. Residuals are float32 between the stages, also where x is float16 or bfloat16.
    """
    batch, dim, length = x.shape
    rows = x.detach().transpose(1, 2).reshape(batch * length, dim)
    found = residual_search(rows, [codes.detach() for codes in codebooks], missing=0)
    return found.view(batch, length, len(codebooks)).permute(2, 0, 1).contiguous()


def statistics(rows: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Return the counts (K,) and sums (K, D) of `fastvq.accumulate` over the finite rows, float32."""
    return accumulate(rows, indices.masked_fill(~rows.isfinite().all(-1), -1), codebook_size)
