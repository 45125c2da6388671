"""The searches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.backends import select as backends

from .registry import check_codes, check_mask, check_values, op


def _of_masked_rows(search: Callable[[Tensor, Tensor], Tensor], x: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """search(x, codes) with -1 in the rows of x that `mask` leaves out. On the CPU only the others are searched;
    elsewhere all are, since to count them would be to wait for the device."""
    if x.device.type != "cpu":
        indices = search(x, codes)
        kept = mask.reshape(*mask.shape, *[1] * (indices.dim() - mask.dim()))
        return indices.masked_fill_(~kept, -1)
    if x.dim() == 3:
        pairs = zip(x, codes, mask, strict=True)
        heads = [_of_masked_rows(search, xh, eh, mh) for xh, eh, mh in pairs]
        return torch.stack(heads) if heads else search(x, codes)
    rows = mask.nonzero().squeeze(1)
    if len(rows) == len(x):
        return search(x, codes)
    found = search(x[rows], codes)
    return found.new_full((len(x), *found.shape[1:]), -1).index_copy_(0, rows, found)


def check_search(x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> None:
    check_values("x", x, (2, 3), "(N, D) or (H, N, D)")
    check_values("codebook", codebook, (x.dim(),), "(K, D)" if x.dim() == 2 else "(H, K, D) beside x (H, N, D)")
    check_codes("codebook", codebook, x)
    if x.dim() == 3 and x.shape[0] != codebook.shape[0]:
        raise ValueError(f"codebook: must have the heads of x, H={x.shape[0]}, got shape {tuple(codebook.shape)}")
    if metric not in ("l2", "dot"):
        raise ValueError(f"metric: must be 'l2' or 'dot', got {metric!r}")
    if mask is not None:
        check_mask(mask, x, x.shape[:-1])


def _search_fake(x: Tensor, codebook: Tensor, *, metric: str = "l2", mask: Tensor | None = None) -> Tensor:
    check_search(x, codebook, metric, mask)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@op(fake=_search_fake, not_native=("mask",))
def search(x: Tensor, codebook: Tensor, *, metric: str = "l2", mask: Tensor | None = None) -> Tensor:
    """The exact nearest code of each vector.

        metric="l2"    index_n = argmin_k sum_j (x_nj - e_kj)^2
        metric="dot"   index_n = argmax_k sum_j x_nj e_kj

    The sums are those of IEEE float64 over ascending j, with difference, product and sum each rounded separately; equal
    values resolve to the lowest index. This holds on every backend, device, thread count and batch split. Memory is
    O(N + K D): there is no N x K matrix.

    Args:
        x: vectors (N, D) or (H, N, D); float32, float16, bfloat16 or float64, any strides.
        codebook: codes (K, D) or (H, K, D) on the same device; any of these dtypes, not necessarily that of x.
        metric: "l2" or "dot".
        mask: bool (N,) or (H, N); a row with False gets -1. On the CPU it isn't searched; elsewhere it is, since to
            leave it out would be to wait for the device.

    Returns:
        int64 indices (N,) or (H, N). A row with a NaN or an infinity gets -1. A code with one is never chosen; where no
        finite code is left, every index is -1.

    Raises:
        TypeError: a dtype that isn't listed. ValueError: shapes, devices or a metric that don't fit; each names the
        argument.

    Numerics: docs/exactness.md. Not differentiable: see `fastvq.quantize`.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017, equation 1.
    """
    check_search(x, codebook, metric, mask)
    run = functools.partial(backends.select("search", x.device), metric=metric)
    return run(x, codebook) if mask is None else _of_masked_rows(run, x, codebook, mask)


def _check_topk_search(x: Tensor, codebook: Tensor, k: int, metric: str, mask: Tensor | None) -> None:
    check_search(x, codebook, metric, mask)
    size = codebook.shape[-2]
    if not 1 <= k <= size:
        raise ValueError(f"k: must lie in [1, {size}] for {size} codes, got {k}")


def _topk_search_fake(x: Tensor, codebook: Tensor, k: int, *, metric: str = "l2", mask: Tensor | None = None) -> Tensor:
    _check_topk_search(x, codebook, k, metric, mask)
    return x.new_empty((*x.shape[:-1], k), dtype=torch.int64)


@op(fake=_topk_search_fake, not_native=("mask",))
def topk_search(x: Tensor, codebook: Tensor, k: int, *, metric: str = "l2", mask: Tensor | None = None) -> Tensor:
    """The k nearest codes of each vector, nearest first.

    Codes are ordered by the float64 sums that define `search`, and equal ones by index, so that the first of them is
    what `search` returns. Like there, the result is the same on every backend, and there is no N x K matrix.

    Args:
        x, codebook, metric, mask: as for `search`.
        k: how many, from 1 to K.

    Returns:
        int64 indices (N, k) or (H, N, k). All are -1 in a row that isn't finite or masked out; where fewer than k codes
        are finite, the last ones are -1.

    Raises:
        TypeError, ValueError: as `search`.

    Numerics: docs/exactness.md. Not differentiable.
    """
    _check_topk_search(x, codebook, k, metric, mask)
    run = functools.partial(backends.select("topk_search", x.device), k=k, metric=metric)
    return run(x, codebook) if mask is None else _of_masked_rows(run, x, codebook, mask)


def check_residual_search(x: Tensor, codebooks: Tensor, mask: Tensor | None = None) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_values("codebooks", codebooks, (3,), "(Q, K, D)")
    check_codes("codebooks", codebooks, x)
    if codebooks.shape[0] == 0:
        raise ValueError(f"codebooks: must hold at least one level, got shape {tuple(codebooks.shape)}")
    if mask is not None:
        check_mask(mask, x, x.shape[:-1])


def _residual_search_fake(x: Tensor, codebooks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    check_residual_search(x, codebooks, mask)
    return x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64)


@op(fake=_residual_search_fake, not_native=("mask",))
def residual_search(x: Tensor, codebooks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The codes of each vector under residual quantization: each level codes what the levels before it left over.

        r_0 = x,   index_nq = argmin_k |r_q,n - e_qk|^2,   r_{q+1} = float32(r_q - e_q,index)

    The difference is one subtraction in float32; in float64, and then rounded, where an argument is float64.

    Args:
        x: vectors (N, D), as for `search`.
        codebooks: codes (Q, K, D), level by level, on the same device.
        mask: bool (N,), as for `search`.

    Returns:
        int64 indices (N, Q): the same as calling `search` level by level. -1 as there; a level without a finite code
        leaves the residual as it is.

    Raises:
        TypeError, ValueError: as `search`.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    check_residual_search(x, codebooks, mask)
    run = backends.select("residual_search", x.device)
    return run(x, codebooks) if mask is None else _of_masked_rows(run, x, codebooks, mask)
