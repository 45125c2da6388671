"""The op `ema_update_`: one step of a codebook's exponential moving averages."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from fastvq.backends import select as backends
from fastvq.precision import as_scalar

from .checks import check_same_device
from .registry import explain, op


def _check_ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    weight: Tensor | None,
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
        ("weight", weight, like_sizes),
    ):
        if tensor is None:
            continue
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


def _check_overlap(written: tuple[Tensor, ...], read: tuple[Tensor | None, ...]) -> None:
    """Refuse memory that is written twice, or written and read."""
    ranges = []
    for tensor in (*written, *read):
        if tensor is not None:
            start = tensor.data_ptr()
            ranges.append((start, start + 4 * tensor.numel() if tensor.is_contiguous() else None))
    ranges.sort(key=_START)
    end: int | None = 0
    for start, next_end in ranges:
        if end is None or start < end:
            return _find_overlap(written, read)
        end = next_end
    if end is None:
        _find_overlap(written, read)


_START = operator.itemgetter(0)


def _find_overlap(written: tuple[Tensor, ...], read: tuple[Tensor | None, ...]) -> None:
    """Raise if a tensor that is written shares an element with itself or another, strides considered."""
    names = ("codebook", "cluster_size", "embed_avg", "counts", "sums", "weight")
    given = [(name, t) for name, t in zip(names, (*written, *read), strict=True) if t is not None]
    for i, (name, tensor) in enumerate(given[: len(written)]):
        if tensor.numel() and _offsets_repeat(tensor):
            raise ValueError(f"{name}: must have memory of its own for each element, but is expanded from fewer")
        for other_name, other in given[i + 1 :]:
            if _ranges_meet(tensor, other) and _share_elements(tensor, other):
                raise ValueError(f"{other_name}: must not overlap {name} in memory, which is written")


def _ranges_meet(a: Tensor, b: Tensor) -> bool:
    first, last = a.data_ptr(), b.data_ptr()
    return first < last + _span(b) and last < first + _span(a) and a.numel() > 0 and b.numel() > 0


def _span(tensor: Tensor) -> int:
    """Return the number of bytes from the first element to the end of the last one."""
    if tensor.is_contiguous():
        return 4 * tensor.numel()
    return 4 * (1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)))


def _offsets_repeat(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and len(torch.unique(_offsets(tensor))) < tensor.numel()


def _share_elements(a: Tensor, b: Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True
    return bool(torch.isin(a.data_ptr() // 4 + _offsets(a), b.data_ptr() // 4 + _offsets(b)).any())


def _offsets(tensor: Tensor) -> Tensor:
    """Return the offsets of the elements in memory from the first one."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + step * torch.arange(size)
    return offsets.flatten()


def _check_values(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    weight: Tensor | None,
) -> None:
    """Check what the op's schema and fake cannot: also the memory of the tensors."""
    _check_ema_update(codebook, cluster_size, embed_avg, counts, sums, decay=decay, eps=eps, weight=weight)
    _check_overlap((codebook, cluster_size, embed_avg), (counts, sums, weight))


def _ema_update_fake(*tensors: Tensor, decay: float, eps: float, weight: Tensor | None = None) -> None:
    _check_ema_update(*tensors, decay=decay, eps=eps, weight=weight)


@op(fake=_ema_update_fake, mutates=("codebook", "cluster_size", "embed_avg"))
def _ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    weight: Tensor | None = None,
) -> None:
    _check_values(codebook, cluster_size, embed_avg, counts, sums, decay, eps, weight)
    run = backends.select("ema_update_", codebook)
    run(codebook, cluster_size, embed_avg, counts, sums, decay=decay, eps=eps, weight=weight)


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float | Tensor,
    eps: float | Tensor,
    weight: Tensor | None = None,
) -> None:
    """Update the exponential moving averages of a codebook by one step, in place.

        N_k <- N_k + w_k (1 - decay) (counts_k - N_k)
        m_k <- m_k + w_k (1 - decay) (sums_k - m_k)
        e_k <- m_k / N'_k   with   N'_k = (N_k + eps) / (N + K eps) N,   N = sum_k N_k

    A code whose N'_k isn't positive (it never had a vector) stays as it is.

    Args:
        codebook: e, (K, D). cluster_size: N, (K,). embed_avg: m, (K, D). All are written.
        counts, sums: of this step, (K,) and (K, D), from `accumulate`.
        decay: share of the old average that is kept, in [0, 1].
        eps: Laplace smoothing of the cluster sizes, not negative. Both are numbers or tensors (); reading one of a GPU
            waits for it.
        weight: w, (K,), the factor of a code's step; None for ones.

    All tensors are float32 and on one device. The written tensors overlap no other in memory. Deterministic for any
    number of threads. The product w_k (1 - decay) is rounded to float32; where it is 0 or 1, N_k and m_k are exactly
    the old or the new values.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. RuntimeError: the op is called within a
        backward pass, as happens where activation checkpointing repeats a compiled layer, which can't detect that.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 to 8; smoothing as in Sonnet's VectorQuantizerEMA.
    """
    if torch.compiler.is_dynamo_compiling() or isinstance(decay, Tensor) or isinstance(eps, Tensor):
        _ema_update_at_(codebook, cluster_size, embed_avg, counts, sums, as_scalar(decay), as_scalar(eps), weight)
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a codebook would learn a batch again, within backward: keep compiled layers that learn out of what"
            " activation checkpointing repeats, or leave them uncompiled"
        )
    try:
        _ema_update_(codebook, cluster_size, embed_avg, counts, sums, decay=decay, eps=eps, weight=weight)
    except RuntimeError as error:
        raise explain(
            error, _check_values, codebook, cluster_size, embed_avg, counts, sums, decay, eps, weight
        ) from None
    torch.autograd.graph.increment_version((codebook, cluster_size, embed_avg))


@torch.library.custom_op("fastvq::ema_update_at_", mutates_args=("codebook", "cluster_size", "embed_avg"))
def _ema_update_at_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: Tensor,
    eps: Tensor,
    weight: Tensor | None,
) -> None:
    """Apply `ema_update_` with numbers () that a compiled graph has as tensors."""
    ema_update_(codebook, cluster_size, embed_avg, counts, sums, decay=float(decay), eps=float(eps), weight=weight)


@_ema_update_at_.register_fake
def _(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: Tensor,
    eps: Tensor,
    weight: Tensor | None,
) -> None:
    _check_ema_update(codebook, cluster_size, embed_avg, counts, sums, decay=0.0, eps=0.0, weight=weight)
