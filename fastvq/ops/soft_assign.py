"""The op `soft_assign`: statistics of the softmax over all codes, without the softmax, and their gradient."""

from __future__ import annotations

from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.arithmetic import compute_dtype
from fastvq.backends.support import SOFT_METRICS

from .checks import check_codes, check_int64, check_like, check_mask, check_values
from .registry import explain, op, option


def _check_soft_assign(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, scale: float) -> None:
    check_values("x", x, (3,), "(G, R, D)")
    check_values("codebook", codebook, (2,), "(K, D)")
    check_codes("codebook", codebook, x)
    if mask is not None:
        check_mask(mask, x, x.shape[:2])
    if metric not in tuple(SOFT_METRICS):
        raise ValueError(f"metric: must be one of {', '.join(SOFT_METRICS)}, got {metric!r}")
    if not scale > 0:
        raise ValueError(f"scale: must be positive, got {scale}")


def _check_soft_assign_forward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    metric: str,
    scale: float,
    floor: float,
) -> None:
    _check_soft_assign(x, codebook, mask, metric, scale)
    if indices is not None:
        check_int64(indices, x, x.shape[:2], "(G, R)", "x")
    _check_floor(floor)


def _check_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise ValueError(f"floor: must lie in [0, 1), got {floor}")


def _soft_assign_forward_fake(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None = None,
    *,
    metric: int,
    scale: float,
    floor: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_soft_assign_forward(x, codebook, mask, indices, option(SOFT_METRICS, metric), scale, floor)
    dtype, (groups, rows, _) = compute_dtype(x, codebook), x.shape
    return (
        x.new_empty((groups, rows), dtype=dtype),
        x.new_empty((groups, rows), dtype=dtype),
        x.new_empty((groups, 0 if indices is None else rows), dtype=dtype),
        x.new_empty((groups, rows if statistics else 0), dtype=dtype),
        x.new_empty((groups, codebook.shape[0] if statistics else 0), dtype=dtype),
    )


@op(fake=_soft_assign_forward_fake)
def _soft_assign_forward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None = None,
    *,
    metric: int,
    scale: float,
    floor: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name = option(SOFT_METRICS, metric)
    _check_soft_assign_forward(x, codebook, mask, indices, name, scale, floor)
    run = backends.select("soft_assign_forward", x, codebook)
    return run(x, codebook, mask, indices, metric=name, scale=scale, floor=floor, statistics=statistics)


def soft_assign_forward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None = None,
    *,
    metric: str,
    scale: float,
    floor: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the soft assignment of `fastvq.soft_assign` for groups of rows.

        logsumexp_n = maximum_n + log_sum_n,   maximum_n = max_k l_nk,   gap_n = maximum_n - l_{n,index_n}

    with l = scale s. The two parts stay apart because their sum has lost the logarithm where the logits are large.
    The cross-entropy of the indices is log_sum + gap.

    Args:
        x: (G, R, D). Means are taken within a group. codebook: (K, D). mask: bool (G, R), or None for all rows.
        indices: int64 (G, R) in [-1, K), or None. The gap of -1 is 0, that of a non-finite code infinite.
        metric, scale, floor: as for `fastvq.soft_assign`.
        statistics: whether to compute entropy and mean; otherwise they are empty, (G, 0).

    Returns:
        maximum, log_sum and gap (G, R), entropy (G, R) and mean (G, K), float64 if x or the codebook is float64, else
        float32. Without indices the gap is empty, (G, 0).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. IndexError: an index is out of range, on
        the CPU.
    """
    try:
        number = SOFT_METRICS[metric]
        return _soft_assign_forward(
            x, codebook, mask, indices, metric=number, scale=scale, floor=floor, statistics=statistics
        )
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, _check_soft_assign_forward, x, codebook, mask, indices, metric, scale, floor) from None


def _check_soft_assign_backward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    indices: Tensor | None,
    logsumexp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    code_grad: Tensor | None,
    metric: str,
    scale: float,
    floor: float,
) -> None:
    _check_soft_assign_forward(x, codebook, mask, indices, metric, scale, floor)
    dtype, (groups, rows, dim), size = compute_dtype(x, codebook), x.shape, codebook.shape[0]
    for name, tensor, shape in (
        ("maximum", maximum, (groups, rows)),
        ("log_sum", log_sum, (groups, rows)),
        ("logsumexp_grad", logsumexp_grad, (groups, rows)),
        ("entropy_grad", entropy_grad, (groups, rows)),
        ("mean_grad", mean_grad, (groups, size)),
        ("code_grad", code_grad, (groups, rows, dim)),
    ):
        check_like(name, tensor, x, shape, dtype)


def _soft_assign_backward_fake(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    indices: Tensor | None,
    logsumexp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    code_grad: Tensor | None,
    *,
    metric: int,
    scale: float,
    floor: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (x, codebook, mask, maximum, log_sum, indices, logsumexp_grad, entropy_grad, mean_grad, code_grad)
    _check_soft_assign_backward(*tensors, option(SOFT_METRICS, metric), scale, floor)
    dtype, (groups, rows, dim), size = compute_dtype(x, codebook), x.shape, codebook.shape[0]
    return (
        x.new_empty((groups, rows, dim if need_x else 0), dtype=dtype),
        x.new_empty((size if need_codebook else 0, dim), dtype=dtype),
    )


@op(fake=_soft_assign_backward_fake)
def _soft_assign_backward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    indices: Tensor | None,
    logsumexp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    code_grad: Tensor | None,
    *,
    metric: int,
    scale: float,
    floor: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    name = option(SOFT_METRICS, metric)
    tensors = (x, codebook, mask, maximum, log_sum, indices, logsumexp_grad, entropy_grad, mean_grad, code_grad)
    _check_soft_assign_backward(*tensors, name, scale, floor)
    run = backends.select("soft_assign_backward", x, codebook)
    return run(*tensors, metric=name, scale=scale, floor=floor, need_x=need_x, need_codebook=need_codebook)


def soft_assign_backward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    indices: Tensor | None,
    logsumexp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    code_grad: Tensor | None,
    *,
    metric: str,
    scale: float,
    floor: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and codebook, given those of the results of `soft_assign_forward`; None means zeros.

        dL/dl_nk = logsumexp_grad_n p_nk + p_nk (u_nk - sum_j p_nj u_nj)
        u_nk = entropy_grad_n d/dp (-p ln max(p, floor)) + mean_grad_k / R + <code_grad_n, e_k>

    Args:
        x, codebook, mask, metric, scale, floor: as in the forward. maximum, log_sum: its results.
        indices: None, or the indices of the forward; logsumexp_grad is then the gradient of log_sum + gap, and
            dL/dl_nk is less by logsumexp_grad_n for k = index_n.
        code_grad: (G, R, D), the gradient of sum_k p_nk e_k with each e_k held constant.
        need_x, need_codebook: which gradients to compute.

    Returns:
        x_grad (G, R, D), or (G, R, 0), and codebook_grad (K, D), or (0, D); float64 if x or the codebook is
        float64, else float32. Excluded rows and non-finite codes have zeros.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. IndexError: an index is out of range, on
        the CPU.
    """
    tensors = (x, codebook, mask, maximum, log_sum, indices, logsumexp_grad, entropy_grad, mean_grad, code_grad)
    try:
        return _soft_assign_backward(
            *tensors,
            metric=SOFT_METRICS[metric],
            scale=scale,
            floor=floor,
            need_x=need_x,
            need_codebook=need_codebook,
        )
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, _check_soft_assign_backward, *tensors, metric, scale, floor) from None
