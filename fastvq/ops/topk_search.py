"""The op `topk_search`: the k nearest codes of each vector."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.support import METRICS

from .packed import PackedCodebook, packed_topk_search
from .registry import explain, op, option
from .search import check_search, fill_missing_, search_masked


def _check_topk_search(x: Tensor, codebook: Tensor, k: int, metric: str, mask: Tensor | None) -> None:
    check_search(x, codebook, metric, mask)
    size = codebook.shape[-2]
    if not 1 <= k <= size:
        raise ValueError(f"k: must lie in [1, {size}] for {size} codes, got {k}")


def _topk_search_fake(x: Tensor, codebook: Tensor, k: int, *, metric: int = 0, mask: Tensor | None = None) -> Tensor:
    _check_topk_search(x, codebook, k, option(METRICS, metric), mask)
    return x.new_empty((*x.shape[:-1], k), dtype=torch.int64)


@op(fake=_topk_search_fake)
def _topk_search(x: Tensor, codebook: Tensor, k: int, *, metric: int = 0, mask: Tensor | None = None) -> Tensor:
    name = option(METRICS, metric)
    _check_topk_search(x, codebook, k, name, mask)
    run = functools.partial(backends.select("topk_search", x, codebook), k=k, metric=name)
    return run(x, codebook) if mask is None else search_masked(run, x, codebook, mask)


def topk_search(
    x: Tensor,
    codebook: Tensor | PackedCodebook,
    k: int,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    missing: int = -1,
) -> Tensor:
    """Return the indices of the k nearest codes of each vector, nearest first.

    Codes are ordered by the float64 sums that define `search`, ties by index, so that the first of them is the one that
    `search` returns. The result is the same on every backend, and the N x K matrix is never materialized.

    Args:
        x, codebook, metric, mask, missing: as for `search`.
        k: number of codes, from 1 to K.

    Returns:
        int64 indices (N, k) or (H, N, k). All are `missing` in a row that is non-finite or masked out. If fewer than k
        codes are finite, the last ones are `missing`.

    Raises:
        TypeError, ValueError: as `search`.

    Numerics: docs/exactness.md. Not differentiable.
    """
    try:
        if isinstance(codebook, PackedCodebook):
            packed, codebook = codebook.number_for(x), codebook.tensor
            if packed is not None and codebook.dim() == x.dim():
                found = packed_topk_search(x, packed[0], k, METRICS[metric], mask)
                return found if missing == -1 else fill_missing_(found, missing)
        found = _topk_search(x, codebook, k, metric=METRICS[metric], mask=mask)
        return found if missing == -1 else fill_missing_(found, missing)
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, _check_topk_search, x, codebook, k, metric, mask) from None
