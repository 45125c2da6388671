"""The op `residual_search`: the indices of a residual quantizer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.support import METRICS

from .checks import check_codes, check_mask, check_metric, check_values
from .packed import PackedCodebook, packed_residual_search
from .registry import explain, op, option
from .search import fill_missing_, search_masked

Codebooks = Tensor | Sequence[Tensor]
"""Codes (Q, K, D), or a sequence with codes (K, D) of a stage or (n, K, D) of several in each place."""


def as_list(codebooks: Codebooks) -> list[Tensor]:
    """Return the codebooks as ops take them.

    Raises:
        ValueError: a tensor without an axis of stages.
    """
    if isinstance(codebooks, Tensor):
        check_values("codebooks", codebooks, (3,), "(Q, K, D), or be a sequence of (K, D)")
        return [codebooks]
    return list(codebooks)


def stage_count(codebooks: Sequence[Tensor]) -> int:
    """Return Q."""
    count = 0
    for part in codebooks:
        count += 1 if part.dim() == 2 else part.shape[0]
    return count


def check_stages(x: Tensor, codebooks: Sequence[Tensor]) -> None:
    """Check rows and the codebooks of all stages."""
    check_values("x", x, (2,), "(N, D)")
    for codes in codebooks:
        check_values("codebooks", codes, (2, 3), "(Q, K, D), or be a sequence of (K, D)")
        check_codes("codebooks", codes, x)
        if codes.dtype != codebooks[0].dtype:
            raise TypeError(f"codebooks: must have one dtype, got {codebooks[0].dtype} and {codes.dtype}")
    if stage_count(codebooks) == 0:
        raise ValueError(f"codebooks: must hold at least one stage, got {[tuple(codes.shape) for codes in codebooks]}")


def _check_residual_search(x: Tensor, codebooks: Sequence[Tensor], metric: str, mask: Tensor | None) -> None:
    check_stages(x, codebooks)
    check_metric(metric)
    if mask is not None:
        check_mask(mask, x, x.shape[:-1])


def _residual_search_fake(x: Tensor, codebooks: list[Tensor], *, metric: int = 0, mask: Tensor | None = None) -> Tensor:
    _check_residual_search(x, codebooks, option(METRICS, metric), mask)
    return x.new_empty((x.shape[0], stage_count(codebooks)), dtype=torch.int64)


@op(fake=_residual_search_fake)
def _residual_search(x: Tensor, codebooks: list[Tensor], *, metric: int = 0, mask: Tensor | None = None) -> Tensor:
    name = option(METRICS, metric)
    _check_residual_search(x, codebooks, name, mask)
    run = functools.partial(backends.select("residual_search", x, codebooks[0]), metric=name)
    return run(x, codebooks) if mask is None else search_masked(run, x, codebooks, mask)


def residual_search(
    x: Tensor,
    codebooks: Codebooks | PackedCodebook,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    missing: int = -1,
) -> Tensor:
    """Return the indices of each vector in a stack of codebooks, each of which codes the residual of the one before.

        r_0 = x,   index_nq = argmin_k |r_q,n - e_qk|^2,   r_{q+1} = float32(r_q - e_q,index)

    The difference is one subtraction in float32, or in float64 with one rounding more if an argument is float64.
    metric="dot" chooses the largest <r_q,n, e_qk> instead.

    Args:
        x: vectors (N, D), as for `search`.
        codebooks: codes (Q, K, D), stage by stage, on the same device; or a sequence of codes (K_q, D) of one dtype,
            whose numbers may differ. A sequence is read where it is, so that codebooks of modules need not be stacked.
            Its entries may also be (n, K, D), the codes of n stages. Or a `PackedCodebook` of one of these.
        metric: "l2" or "dot".
        mask: bool (N,), and missing: as for `search`.

    Returns:
        int64 indices (N, Q): the same as one `search` a stage, and `missing` as there. A stage without a finite code
        leaves the residual as it is.

    Raises:
        TypeError, ValueError: as `search`.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    packed = None
    if isinstance(codebooks, PackedCodebook):
        packed, codebooks = codebooks.number_for(x), codebooks.codebook
    books = codebooks if type(codebooks) is list else as_list(codebooks)
    try:
        if packed is not None:
            found = packed_residual_search(x, packed[0], METRICS[metric], mask)
            return found if missing == -1 else fill_missing_(found, missing)
        found = _residual_search(x, books, metric=METRICS[metric], mask=mask)
        return found if missing == -1 else fill_missing_(found, missing)
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, _check_residual_search, x, books, metric, mask) from None
