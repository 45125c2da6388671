"""The op `residual_quantize`: lookup, output and losses of a stack of codebooks, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.arithmetic import compute_dtype
from fastvq.backends.support import GRADIENTS

from .checks import check_gradients, check_int64, check_same_device
from .registry import explain, op, option
from .residual_search import Codebooks, as_list, check_stages, stage_count


def _check_stage_indices(indices: Tensor, x: Tensor, codebooks: Sequence[Tensor]) -> None:
    check_int64(indices, x, (x.shape[0], stage_count(codebooks)), "(N, Q)", "x and codebooks")


def _residual_quantize_forward_fake(
    x: Tensor, codebooks: list[Tensor], indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_stages(x, codebooks)
    _check_stage_indices(indices, x, codebooks)
    stages, dtype = stage_count(codebooks), compute_dtype(x, codebooks[0])
    residuals = x.new_empty((stages if keep_residuals else 0, *x.shape), dtype=dtype)
    return x.new_empty(x.shape), x.new_empty((stages,), dtype=dtype), residuals


def _check_residual_quantize_forward(x: Tensor, codebooks: Sequence[Tensor], indices: Tensor) -> None:
    check_stages(x, codebooks)
    _check_stage_indices(indices, x, codebooks)


@op(fake=_residual_quantize_forward_fake)
def _residual_quantize_forward(
    x: Tensor, codebooks: list[Tensor], indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_residual_quantize_forward(x, codebooks, indices)
    return backends.select("residual_quantize_forward", x, codebooks[0])(x, codebooks, indices, keep_residuals)


def residual_quantize_forward(
    x: Tensor, codebooks: Codebooks, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `quantize_forward` for all stages of a residual quantizer, in one pass.

        r_0 = x,   r_{q+1} = r_q - e_{q,index_q},   quantized = sum_q e_{q,index_q}
        error_q = mean of (r_q - e_{q,index_q})^2 over the D elements of the rows with a code at stage q

    Args:
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        codebooks: codes (Q, K, D), any of these dtypes; or a sequence, as for `residual_search`.
        indices: int64 (N, Q) in [-1, K_q), as from `residual_search`; a stage with -1 changes neither output nor
            residual.
        keep_residuals: whether to return the residuals.

    Returns:
        quantized (N, D) in the dtype of x; errors (Q,); the residuals r_q (Q, N, D), or an empty (0, N, D). Arithmetic,
        errors and residuals are float64 if an argument is float64, else float32. Otherwise as `quantize_forward`.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices are invalid. IndexError: an index is out of range, on the CPU.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    books = codebooks if type(codebooks) is list else as_list(codebooks)
    try:
        return _residual_quantize_forward(x, books, indices, keep_residuals)
    except RuntimeError as error:
        raise explain(error, _check_residual_quantize_forward, x, books, indices) from None


def _check_residual_quantize_backward(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, quantized_grad: Tensor, error_grads: Tensor, gradient: str
) -> None:
    check_stages(x, codebooks)
    _check_stage_indices(indices, x, codebooks)
    check_gradients(x, quantized_grad, gradient)
    dtype = compute_dtype(x, codebooks[0])
    check_same_device("error_grads", error_grads, x)
    if error_grads.shape != (stage_count(codebooks),) or error_grads.dtype != dtype:
        raise ValueError(
            f"error_grads: must be ({stage_count(codebooks)},) of {dtype}, got {error_grads.dtype}"
            f" {tuple(error_grads.shape)}"
        )


def _residual_quantize_backward_fake(
    x: Tensor,
    codebooks: list[Tensor],
    indices: Tensor,
    quantized_grad: Tensor,
    error_grads: Tensor,
    *,
    gradient: int,
    commitment_weight: float,
) -> Tensor:
    _check_residual_quantize_backward(x, codebooks, indices, quantized_grad, error_grads, option(GRADIENTS, gradient))
    return x.new_empty(x.shape)


@op(fake=_residual_quantize_backward_fake)
def _residual_quantize_backward(
    x: Tensor,
    codebooks: list[Tensor],
    indices: Tensor,
    quantized_grad: Tensor,
    error_grads: Tensor,
    *,
    gradient: int,
    commitment_weight: float,
) -> Tensor:
    name = option(GRADIENTS, gradient)
    _check_residual_quantize_backward(x, codebooks, indices, quantized_grad, error_grads, name)
    run = backends.select("residual_quantize_backward", x, codebooks[0])
    return run(x, codebooks, indices, quantized_grad, error_grads, gradient=name, commitment_weight=commitment_weight)


def residual_quantize_backward(
    x: Tensor,
    codebooks: Codebooks,
    indices: Tensor,
    quantized_grad: Tensor,
    error_grads: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    """Return the gradient of x, given those of the output and the errors of `residual_quantize_forward`, in one pass.

        x_grad_n = sum over the stages q with a code of
                   G_{n,q}(quantized_grad_n) + commitment_weight 2 error_grad_q (r_q,n - e_q) / (D rows_q)

    with G as in `quantize_backward`, for the residual and the code of the stage, and rows_q the number of rows with a
    code at stage q. The derivative of each residual with respect to x is the identity: codes are held constant.

    Args:
        x, codebooks, indices: as in the forward; the codebooks must hold the same values.
        quantized_grad: (N, D) in the dtype of x. error_grads: (Q,) in that of the errors.
        gradient: "ste" or "rotation". commitment_weight: factor of the errors in the loss.

    Returns:
        (N, D) in the dtype of x, computed in that of the errors.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: as `quantize_backward`.
    """
    books = codebooks if type(codebooks) is list else as_list(codebooks)
    tensors = (x, books, indices, quantized_grad, error_grads)
    try:
        return _residual_quantize_backward(*tensors, gradient=GRADIENTS[gradient], commitment_weight=commitment_weight)
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, _check_residual_quantize_backward, *tensors, gradient) from None
