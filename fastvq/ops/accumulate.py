"""What a codebook learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends

from .registry import check_indices, check_same_device, check_values, op


def _check_accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_indices(indices, x)
    if codebook_size < 1:
        raise ValueError(f"codebook_size: must be at least 1, got {codebook_size}")


def _accumulate_fake(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    _check_accumulate(x, indices, codebook_size)
    return (
        x.new_empty((codebook_size,), dtype=torch.float32),
        x.new_empty((codebook_size, x.shape[1]), dtype=torch.float32),
    )


@op(fake=_accumulate_fake)
def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code has, and their sum.

        counts_k = |{n : index_n = k}|,   sums_k = sum over {n : index_n = k} of x_n

    Args:
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        indices: int64 (N,) in [-1, K); a row with -1 is skipped, whatever it holds.
        codebook_size: K.

    Returns:
        counts (K,) and sums (K, D), float32. Sums are taken in float64 and rounded once; on the CPU in ascending order
        of n, so that the result doesn't depend on the number of threads. Memory is O(N + K D): there is no one-hot.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that don't fit. IndexError: an index out of range, on
        the CPU; elsewhere the device asserts, since looking would mean waiting for it.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 and 7.
    """
    _check_accumulate(x, indices, codebook_size)
    return backends.select("accumulate", x.device)(x, indices, codebook_size)


def _check_ema_update(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, *, decay: float, eps: float
) -> None:
    if codebook.dim() != 2:
        raise ValueError(f"codebook: must have shape (K, D), got {tuple(codebook.shape)}")
    like_codes, like_sizes, device = codebook.shape, codebook.shape[:1], codebook.device
    for name, tensor, shape in (
        ("codebook", codebook, like_codes),
        ("cluster_size", cluster_size, like_sizes),
        ("embed_avg", embed_avg, like_codes),
        ("counts", counts, like_sizes),
        ("sums", sums, like_codes),
    ):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: must be float32 whatever the module's dtype is, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            check_same_device(name, tensor, codebook, "codebook")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: must lie in [0, 1], got {decay}")
    if not eps >= 0:
        raise ValueError(f"eps: must not be negative, got {eps}")


def _ema_update_fake(*tensors: Tensor, decay: float, eps: float) -> None:
    _check_ema_update(*tensors, decay=decay, eps=eps)


@op(fake=_ema_update_fake, mutates=("codebook", "cluster_size", "embed_avg"))
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
) -> None:
    """One step of the codebook's exponential moving averages, in place.

        N_k <- decay N_k + (1 - decay) counts_k
        m_k <- decay m_k + (1 - decay) sums_k
        e_k <- m_k / N'_k   with   N'_k = (N_k + eps) / (N + K eps) N,   N = sum_k N_k

    A code whose N'_k isn't positive (nothing was ever counted) stays as it is.

    Args:
        codebook: e, (K, D). cluster_size: N, (K,). embed_avg: m, (K, D). All are written.
        counts, sums: of this step, (K,) and (K, D), from `accumulate`.
        decay: share of the old average that is kept, in [0, 1].
        eps: Laplace smoothing of the cluster sizes, not negative.

    All tensors are float32 and on one device. Deterministic for any number of threads.

    Raises:
        TypeError, ValueError: what doesn't fit, by name. RuntimeError: it is called within a backward pass, as happens
        where activation checkpointing repeats a compiled layer, which can't know that it is repeated.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 to 8; smoothing as in Sonnet's VectorQuantizerEMA.
    """
    _check_ema_update(codebook, cluster_size, embed_avg, counts, sums, decay=decay, eps=eps)
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a codebook would learn a batch again, within backward: keep compiled layers that learn out of what"
            " activation checkpointing repeats, or leave them uncompiled"
        )
    backends.select("ema_update_", codebook.device)(
        codebook, cluster_size, embed_avg, counts, sums, decay=decay, eps=eps
    )
