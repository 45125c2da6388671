"""The op `search`: the exact nearest code of each vector."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.support import METRICS

from .checks import check_codes, check_mask, check_metric, check_values
from .packed import PackedCodebook, packed_search
from .registry import explain, op, option


def check_search(x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> None:
    """Check the arguments of `search`."""
    check_values("x", x, (2, 3), "(N, D) or (H, N, D)")
    check_values("codebook", codebook, (x.dim(),), "(K, D)" if x.dim() == 2 else "(H, K, D) beside x (H, N, D)")
    check_codes("codebook", codebook, x)
    if x.dim() == 3 and x.shape[0] != codebook.shape[0]:
        raise ValueError(f"codebook: must have the heads of x, H={x.shape[0]}, got shape {tuple(codebook.shape)}")
    check_metric(metric)
    if mask is not None:
        check_mask(mask, x, x.shape[:-1])


def search_masked(search: Callable[[Tensor, Any], Tensor], x: Tensor, codes: Any, mask: Tensor) -> Tensor:
    """Return search(x, codes) with -1 in the rows of x that `mask` excludes.

    The CPU searches only the other rows. Other devices search all, since to count rows would wait for the device.
    """
    if x.device.type != "cpu":
        indices = search(x, codes)
        return indices.masked_fill_(~mask.reshape(*mask.shape, *[1] * (indices.dim() - mask.dim())), -1)
    if x.dim() == 3:
        pairs = zip(x, codes, mask, strict=True)
        heads = [search_masked(search, xh, eh, mh) for xh, eh, mh in pairs]
        return torch.stack(heads) if heads else search(x, codes)
    rows = mask.nonzero().squeeze(1)
    if len(rows) == len(x):
        return search(x, codes)
    found = search(x[rows], codes)
    return found.new_full((len(x), *found.shape[1:]), -1).index_copy_(0, rows, found)


def _search_fake(x: Tensor, codebook: Tensor, *, metric: int = 0, mask: Tensor | None = None) -> Tensor:
    check_search(x, codebook, option(METRICS, metric), mask)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@op(fake=_search_fake)
def _search(x: Tensor, codebook: Tensor, *, metric: int = 0, mask: Tensor | None = None) -> Tensor:
    name = option(METRICS, metric)
    check_search(x, codebook, name, mask)
    run = functools.partial(backends.select("search", x, codebook), metric=name)
    return run(x, codebook) if mask is None else search_masked(run, x, codebook, mask)


def fill_missing_(indices: Tensor, missing: int) -> Tensor:
    """Replace -1 by `missing`, in place.

    Raises:
        TypeError: missing is no integer.
    """
    if type(missing) is not int:
        raise TypeError(f"missing: must be an integer, got {missing!r}")
    return indices.masked_fill_(indices < 0, missing)


def search(
    x: Tensor,
    codebook: Tensor | PackedCodebook,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    missing: int = -1,
) -> Tensor:
    """Return the index of the exact nearest code of each vector.

        metric="l2"    index_n = argmin_k sum_j (x_nj - e_kj)^2
        metric="dot"   index_n = argmax_k sum_j x_nj e_kj

    The sums are those of IEEE float64 over ascending j, with difference, product and sum each rounded separately; equal
    values resolve to the lowest index. This holds on every backend, device, thread count and batch split. Memory is
    O(N + K D): the N x K matrix is never materialized.

    Args:
        x: vectors (N, D) or (H, N, D); float32, float16, bfloat16 or float64, any strides.
        codebook: codes (K, D) or (H, K, D) on the same device; any of these dtypes, not necessarily that of x. Or a
            `PackedCodebook` of them.
        metric: "l2" or "dot".
        mask: bool (N,) or (H, N); a row with False gets -1. The CPU doesn't search it; other devices do, since to
            leave it out would wait for the device.
        missing: the index of rows without a nearest code. With 0, the result can be looked up, as by `F.embedding`.

    Returns:
        int64 indices (N,) or (H, N). A row with a NaN or an infinity gets `missing`. A code with one is never chosen;
        without any finite code, every index is `missing`.

    Raises:
        TypeError: a dtype isn't listed. ValueError: a shape, a device or the metric is invalid. The message names the
        argument.

    Numerics: docs/exactness.md. Not differentiable: see `fastvq.quantize`.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017, equation 1.
    """
    try:
        if isinstance(codebook, PackedCodebook):
            packed, codebook = codebook.number_for(x), codebook.tensor
            if packed is not None and codebook.dim() == x.dim():
                found = packed_search(x, packed[0], METRICS[metric], mask)
                return found if missing == -1 else fill_missing_(found, missing)
        found = _search(x, codebook, metric=METRICS[metric], mask=mask)
        return found if missing == -1 else fill_missing_(found, missing)
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, check_search, x, codebook, metric, mask) from None
