"""The op `accumulate`: the number of vectors of each code, and their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends

from .checks import check_indices, check_values
from .registry import explain, op


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
def _accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    _check_accumulate(x, indices, codebook_size)
    return backends.select("accumulate", x)(x, indices, codebook_size)


def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Count and sum the vectors of each code.

        counts_k = |{n : index_n = k}|,   sums_k = sum over {n : index_n = k} of x_n

    Args:
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        indices: int64 (N,) in [-1, K); a row with -1 is excluded, whatever it holds.
        codebook_size: K.

    Returns:
        counts (K,) and sums (K, D), float32. Sums are taken in float64 and rounded once; on the CPU in ascending order
        of n, so that the result is independent of the number of threads. Memory is O(N + K D): there
        is no one-hot matrix.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices are invalid. IndexError: an index is out of range, on the CPU;
        elsewhere the device asserts, since to read the indices would wait for it.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 and 7.
    """
    try:
        return _accumulate(x, indices, codebook_size)
    except RuntimeError as error:
        raise explain(error, _check_accumulate, x, indices, codebook_size) from None
