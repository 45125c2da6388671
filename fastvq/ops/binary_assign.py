"""The op `binary_assign`: the soft assignment to all vectors of signs, and its gradient."""

from __future__ import annotations

from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.arithmetic import compute_dtype

from .checks import check_like, check_mask, check_values
from .registry import op

LARGEST_DIM = 30


def check_binary_assign(x: Tensor, mask: Tensor | None, scale: float, floor: float) -> None:
    """Check the arguments of `binary_assign_forward`."""
    check_values("x", x, (3,), "(G, R, D)")
    if not 1 <= x.shape[2] <= LARGEST_DIM:
        raise ValueError(f"x: must have D in [1, {LARGEST_DIM}] dimensions, got shape {tuple(x.shape)}")
    if mask is not None:
        check_mask(mask, x, x.shape[:2])
    if not scale >= 0:
        raise ValueError(f"scale: must not be negative, got {scale}")
    if not 0 <= floor < 1:
        raise ValueError(f"floor: must lie in [0, 1), got {floor}")


def _binary_assign_forward_fake(x: Tensor, mask: Tensor | None, *, scale: float, floor: float) -> tuple[Tensor, Tensor]:
    check_binary_assign(x, mask, scale, floor)
    dtype = compute_dtype(x)
    return x.new_empty(x.shape[:2], dtype=dtype), x.new_empty((x.shape[0], 1 << x.shape[2]), dtype=dtype)


@op(fake=_binary_assign_forward_fake)
def _binary_assign_forward(x: Tensor, mask: Tensor | None, *, scale: float, floor: float) -> tuple[Tensor, Tensor]:
    check_binary_assign(x, mask, scale, floor)
    return backends.select("binary_assign_forward", x)(x, mask, scale=scale, floor=floor)


def binary_assign_forward(x: Tensor, mask: Tensor | None, *, scale: float, floor: float) -> tuple[Tensor, Tensor]:
    """Return the soft assignment of `fastvq.binary_assign` for groups of rows.

    Args:
        x: (G, R, D); float32, float16, bfloat16 or float64. Means are taken within a group.
        mask: bool (G, R), or None for all rows. scale, floor: as for `fastvq.binary_assign`.

    Returns:
        entropy (G, R) and mean (G, 2^D), float32, or float64 for float64 x.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    return _binary_assign_forward(x, mask, scale=scale, floor=floor)


def _check_binary_assign_backward(
    x: Tensor,
    mask: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    scale: float,
    floor: float,
) -> None:
    check_binary_assign(x, mask, scale, floor)
    dtype = compute_dtype(x)
    check_like("entropy_grad", entropy_grad, x, tuple(x.shape[:2]), dtype)
    check_like("mean_grad", mean_grad, x, (x.shape[0], 1 << x.shape[2]), dtype)


def _binary_assign_backward_fake(
    x: Tensor,
    mask: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    *,
    scale: float,
    floor: float,
) -> Tensor:
    _check_binary_assign_backward(x, mask, entropy_grad, mean_grad, scale, floor)
    return x.new_empty(x.shape, dtype=compute_dtype(x))


@op(fake=_binary_assign_backward_fake)
def _binary_assign_backward(
    x: Tensor,
    mask: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    *,
    scale: float,
    floor: float,
) -> Tensor:
    _check_binary_assign_backward(x, mask, entropy_grad, mean_grad, scale, floor)
    run = backends.select("binary_assign_backward", x)
    return run(x, mask, entropy_grad, mean_grad, scale=scale, floor=floor)


def binary_assign_backward(
    x: Tensor,
    mask: Tensor | None,
    entropy_grad: Tensor | None,
    mean_grad: Tensor | None,
    *,
    scale: float,
    floor: float,
) -> Tensor:
    """Return the gradient of x, given those of the results of `binary_assign_forward`; None stands for zeros.

    The gradient is (G, R, D) in float32, or float64 for float64 x, with zeros in excluded rows.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    return _binary_assign_backward(x, mask, entropy_grad, mean_grad, scale=scale, floor=floor)
