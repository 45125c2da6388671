"""The searches."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import backends

from .registry import check_codes, check_values, op


def _check_search(x: Tensor, codebook: Tensor, metric: str) -> None:
    check_values("x", x, (2, 3), "(N, D) or (H, N, D)")
    check_values("codebook", codebook, (x.dim(),), "(K, D)" if x.dim() == 2 else "(H, K, D) beside x (H, N, D)")
    check_codes("codebook", codebook, x)
    if x.dim() == 3 and x.shape[0] != codebook.shape[0]:
        raise ValueError(f"codebook: must have the heads of x, H={x.shape[0]}, got shape {tuple(codebook.shape)}")
    if metric not in ("l2", "dot"):
        raise ValueError(f"metric: must be 'l2' or 'dot', got {metric!r}")


def _search_fake(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    _check_search(x, codebook, metric)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@op(fake=_search_fake)
def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
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

    Returns:
        int64 indices (N,) or (H, N). A row with a NaN or an infinity gets -1. A code with one is never chosen; where no
        finite code is left, every index is -1.

    Raises:
        TypeError: a dtype that isn't listed. ValueError: shapes, devices or a metric that don't fit; each names the
        argument.

    Numerics: docs/exactness.md. Not differentiable: see `fastvq.quantize`.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017, equation 1.
    """
    _check_search(x, codebook, metric)
    return backends.select("search", x.device)(x, codebook, metric=metric)


def check_residual_search(x: Tensor, codebooks: Tensor) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_values("codebooks", codebooks, (3,), "(Q, K, D)")
    check_codes("codebooks", codebooks, x)
    if codebooks.shape[0] == 0:
        raise ValueError(f"codebooks: must hold at least one level, got shape {tuple(codebooks.shape)}")


def _residual_search_fake(x: Tensor, codebooks: Tensor) -> Tensor:
    check_residual_search(x, codebooks)
    return x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64)


@op(fake=_residual_search_fake)
def residual_search(x: Tensor, codebooks: Tensor) -> Tensor:
    """The codes of each vector under residual quantization: each level codes what the levels before it left over.

        r_0 = x,   index_nq = argmin_k |r_q,n - e_qk|^2,   r_{q+1} = float32(r_q - e_q,index)

    The difference is one subtraction in float32; in float64, and then rounded, where an argument is float64.

    Args:
        x: vectors (N, D), as for `search`.
        codebooks: codes (Q, K, D), level by level, on the same device.

    Returns:
        int64 indices (N, Q): the same as calling `search` level by level. -1 as there; a level without a finite code
        leaves the residual as it is.

    Raises:
        TypeError, ValueError: as `search`.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    check_residual_search(x, codebooks)
    return backends.select("residual_search", x.device)(x, codebooks)
