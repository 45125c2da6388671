"""The quantize step once the indices are known, and its gradient: of one codebook, and of a stack of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import reference
from fastvq.backends import select as backends

from .registry import GRADIENTS, check_codes, check_indices, check_int64, check_same_device, check_values, op
from .search import check_residual_search


def _check_quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_values("codebook", codebook, (2,), "(K, D)")
    check_codes("codebook", codebook, x)
    check_indices(indices, x)


def _quantize_forward_fake(
    x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize_forward(x, codebook, indices)
    dtype = reference.compute_dtype(x, codebook)
    codes = x.new_empty((x.shape[0] if keep_codes else 0, x.shape[1]), dtype=dtype)
    return x.new_empty(x.shape), codes, x.new_empty((), dtype=dtype)


@op(fake=_quantize_forward_fake)
def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lookup and quantization error in one pass: what `fastvq.quantize` does once it has the indices.

        quantized_n = e_{index_n},   error = mean of (x - quantized)^2 over the D elements of the rows with a code

    Args:
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        codebook: codes (K, D), any of these dtypes.
        indices: int64 (N,) in [-1, K); a row with -1 gets zeros and counts for nothing.
        keep_codes: whether the second result is wanted, which `quantize_backward` needs.

    Returns:
        quantized (N, D) in the dtype of x; the codes (N, D) unrounded, in float32 or, where an argument is, in float64,
        or an empty (0, D); error () in that dtype, 0 if no row counts. On the CPU rows are summed in float64 in a fixed
        order: the result doesn't depend on the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that don't fit. IndexError: an index out of range, on the CPU.

    Source: van den Oord et al. 2017, equations 2 and 3.
    """
    _check_quantize_forward(x, codebook, indices)
    return backends.select("quantize_forward", x.device)(x, codebook, indices, keep_codes)


def _check_gradients(x: Tensor, quantized_grad: Tensor, gradient: str) -> None:
    _check_beside("quantized_grad", quantized_grad, x, (x.dtype,))
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: must be one of {', '.join(GRADIENTS)}, got {gradient!r}")


def _check_beside(name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_same_device(name, tensor, x)
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def _check_quantize_backward(
    x: Tensor, codes: Tensor, indices: Tensor, quantized_grad: Tensor, loss_grad: Tensor, gradient: str
) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_indices(indices, x)
    _check_beside("codes", codes, x, (torch.float32, torch.float64))
    _check_gradients(x, quantized_grad, gradient)
    check_same_device("loss_grad", loss_grad, x)
    if loss_grad.shape != () or loss_grad.dtype != codes.dtype:
        raise ValueError(f"loss_grad: must be one number of {codes.dtype}, got {loss_grad.dtype} {loss_grad.shape}")


def _quantize_backward_fake(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    quantized_grad: Tensor,
    loss_grad: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    _check_quantize_backward(x, codes, indices, quantized_grad, loss_grad, gradient)
    return x.new_empty(x.shape)


@op(fake=_quantize_backward_fake)
def quantize_backward(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    quantized_grad: Tensor,
    loss_grad: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    """The gradient of x from those of `quantize_forward`'s quantized and error, in one pass.

        x_grad_n = G_n(quantized_grad_n) + commitment_weight 2 loss_grad (x_n - e_n) / (D |{n : index_n >= 0}|)

    with G the identity for "ste" and lambda R^T for "rotation", see `fastvq.quantize`; zeros for index -1.

    Args:
        x, indices: as in the forward. codes: what it kept.
        quantized_grad: (N, D) in the dtype of x. loss_grad: () in that of the codes.
        gradient: "ste" or "rotation". commitment_weight: factor of the error in the loss.

    Returns:
        (N, D) in the dtype of x, computed in that of the codes.

    Raises:
        TypeError, ValueError: what doesn't fit, by name.

    Source: van den Oord et al. 2017, section 3.2; Fifty et al. 2024, section 4.2.
    """
    _check_quantize_backward(x, codes, indices, quantized_grad, loss_grad, gradient)
    return backends.select("quantize_backward", x.device)(
        x, codes, indices, quantized_grad, loss_grad, gradient=gradient, commitment_weight=commitment_weight
    )


def _check_level_indices(indices: Tensor, x: Tensor, codebooks: Tensor) -> None:
    check_int64(indices, x, (x.shape[0], codebooks.shape[0]), "(N, Q)", "x and codebooks")


def _residual_quantize_forward_fake(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_residual_search(x, codebooks)
    _check_level_indices(indices, x, codebooks)
    levels, dtype = codebooks.shape[0], reference.compute_dtype(x, codebooks)
    residuals = x.new_empty((levels if keep_residuals else 0, *x.shape), dtype=dtype)
    return x.new_empty(x.shape), x.new_empty((levels,), dtype=dtype), residuals


@op(fake=_residual_quantize_forward_fake)
def residual_quantize_forward(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_forward` of all levels of a residual quantizer, in one pass.

        r_0 = x,   r_{q+1} = r_q - e_{q,index_q},   quantized = sum_q e_{q,index_q}
        error_q = mean of (r_q - e_{q,index_q})^2 over the D elements of the rows with a code at level q

    Args:
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        codebooks: codes (Q, K, D), any of these dtypes.
        indices: int64 (N, Q) in [-1, K), as from `residual_search`; a level with -1 adds nothing and takes nothing off.
        keep_residuals: whether the third result is wanted.

    Returns:
        quantized (N, D) in the dtype of x; errors (Q,); the residuals r_q (Q, N, D), or an empty (0, N, D). Arithmetic,
        errors and residuals are float32, or float64 where an argument is. The rest as `quantize_forward`.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that don't fit. IndexError: an index out of range, on the CPU.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    check_residual_search(x, codebooks)
    _check_level_indices(indices, x, codebooks)
    return backends.select("residual_quantize_forward", x.device)(x, codebooks, indices, keep_residuals)


def _check_residual_quantize_backward(
    x: Tensor, codebooks: Tensor, indices: Tensor, quantized_grad: Tensor, error_grads: Tensor, gradient: str
) -> None:
    check_residual_search(x, codebooks)
    _check_level_indices(indices, x, codebooks)
    _check_gradients(x, quantized_grad, gradient)
    dtype = reference.compute_dtype(x, codebooks)
    check_same_device("error_grads", error_grads, x)
    if error_grads.shape != codebooks.shape[:1] or error_grads.dtype != dtype:
        raise ValueError(
            f"error_grads: must be ({codebooks.shape[0]},) of {dtype}, got {error_grads.dtype}"
            f" {tuple(error_grads.shape)}"
        )


def _residual_quantize_backward_fake(
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    quantized_grad: Tensor,
    error_grads: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    _check_residual_quantize_backward(x, codebooks, indices, quantized_grad, error_grads, gradient)
    return x.new_empty(x.shape)


@op(fake=_residual_quantize_backward_fake)
def residual_quantize_backward(
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    quantized_grad: Tensor,
    error_grads: Tensor,
    *,
    gradient: str,
    commitment_weight: float,
) -> Tensor:
    """The gradient of x from those of `residual_quantize_forward`'s quantized and errors, in one pass.

        x_grad_n = sum over the levels q with a code of
                   G_{n,q}(quantized_grad_n) + commitment_weight 2 error_grad_q (r_q,n - e_q) / (D rows_q)

    with G as in `quantize_backward`, for the residual and the code of the level, and rows_q the number of rows with a
    code there. Each residual depends on x as x itself: codes are held constant.

    Args:
        x, codebooks, indices: as in the forward; the codebooks as they were then.
        quantized_grad: (N, D) in the dtype of x. error_grads: (Q,) in that of the errors.
        gradient: "ste" or "rotation". commitment_weight: factor of the errors in the loss.

    Returns:
        (N, D) in the dtype of x, computed in that of the errors.

    Raises:
        TypeError, ValueError: what doesn't fit, by name.

    Source: as `quantize_backward`.
    """
    _check_residual_quantize_backward(x, codebooks, indices, quantized_grad, error_grads, gradient)
    return backends.select("residual_quantize_backward", x.device)(
        x, codebooks, indices, quantized_grad, error_grads, gradient=gradient, commitment_weight=commitment_weight
    )
