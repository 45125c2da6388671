"""The op `residual_search`: the indices of a residual quantizer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends

from .checks import check_codes, check_mask, check_values
from .registry import explain, op
from .search import search_masked


def check_residual_search(x: Tensor, codebooks: Tensor, mask: Tensor | None = None) -> None:
    """Check the arguments of `residual_search`."""
    check_values("x", x, (2,), "(N, D)")
    check_values("codebooks", codebooks, (3,), "(Q, K, D)")
    check_codes("codebooks", codebooks, x)
    if codebooks.shape[0] == 0:
        raise ValueError(f"codebooks: must hold at least one stage, got shape {tuple(codebooks.shape)}")
    if mask is not None:
        check_mask(mask, x, x.shape[:-1])


def _residual_search_fake(x: Tensor, codebooks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    check_residual_search(x, codebooks, mask)
    return x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64)


@op(fake=_residual_search_fake)
def _residual_search(x: Tensor, codebooks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    check_residual_search(x, codebooks, mask)
    run = backends.select("residual_search", x, codebooks)
    return run(x, codebooks) if mask is None else search_masked(run, x, codebooks, mask)


def residual_search(x: Tensor, codebooks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the indices of each vector in a stack of codebooks, each of which codes the residual of the one before.

        r_0 = x,   index_nq = argmin_k |r_q,n - e_qk|^2,   r_{q+1} = float32(r_q - e_q,index)

    The difference is one subtraction in float32, or in float64 with one rounding more if an argument is float64.

    Args:
        x: vectors (N, D), as for `search`.
        codebooks: codes (Q, K, D), stage by stage, on the same device.
        mask: bool (N,), as for `search`.

    Returns:
        int64 indices (N, Q): the same as one `search` a stage, and -1 as there. A stage without a finite code leaves
        the residual as it is.

    Raises:
        TypeError, ValueError: as `search`.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    try:
        return _residual_search(x, codebooks, mask=mask)
    except RuntimeError as error:
        raise explain(error, check_residual_search, x, codebooks, mask) from None
