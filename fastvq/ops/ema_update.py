"""The op `ema_update_`: one step of a codebook's exponential moving averages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends

from .checks import check_same_device
from .registry import op


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
