"""The op `quantize`: lookup, output and loss of one codebook, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.arithmetic import compute_dtype
from fastvq.backends.support import GRADIENTS

from .checks import check_beside, check_codes, check_gradients, check_indices, check_same_device, check_values
from .registry import explain, op, option


def _check_quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_values("codebook", codebook, (2,), "(K, D)")
    check_codes("codebook", codebook, x)
    check_indices(indices, x)


def _quantize_forward_fake(
    x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize_forward(x, codebook, indices)
    dtype = compute_dtype(x, codebook)
    codes = x.new_empty((x.shape[0] if keep_codes else 0, x.shape[1]), dtype=dtype)
    return x.new_empty(x.shape), codes, x.new_empty((), dtype=dtype)


@op(fake=_quantize_forward_fake)
def _quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize_forward(x, codebook, indices)
    return backends.select("quantize_forward", x, codebook)(x, codebook, indices, keep_codes)


def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Look up the codes and measure the quantization error, in one pass.

        quantized_n = e_{index_n},   error = mean of (x - quantized)^2 over the D elements of the rows with a code

    `fastvq.quantize` calls this once it has the indices.

    Args:
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        codebook: codes (K, D), any of these dtypes.
        indices: int64 (N,) in [-1, K); a row with -1 is excluded and gets zeros.
        keep_codes: whether to return the codes, which `quantize_backward` needs.

    Returns:
        quantized (N, D) in the dtype of x; the codes (N, D) unrounded, in float64 if an argument is float64, else in
        float32, or an empty (0, D); error () in the dtype of the codes, 0 if all rows are excluded. On the CPU rows are
        summed in float64 in a fixed order, so that the result is independent of the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices are invalid. IndexError: an index is out of range, on the CPU.

    Source: van den Oord et al. 2017, equations 2 and 3.
    """
    try:
        return _quantize_forward(x, codebook, indices, keep_codes)
    except RuntimeError as error:
        raise explain(error, _check_quantize_forward, x, codebook, indices) from None


def _check_quantize_backward(
    x: Tensor, codes: Tensor, indices: Tensor, quantized_grad: Tensor, loss_grad: Tensor, gradient: str
) -> None:
    check_values("x", x, (2,), "(N, D)")
    check_indices(indices, x)
    check_beside("codes", codes, x, (torch.float32, torch.float64))
    check_gradients(x, quantized_grad, gradient)
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
    gradient: int,
    commitment_weight: float,
) -> Tensor:
    _check_quantize_backward(x, codes, indices, quantized_grad, loss_grad, option(GRADIENTS, gradient))
    return x.new_empty(x.shape)


@op(fake=_quantize_backward_fake)
def _quantize_backward(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    quantized_grad: Tensor,
    loss_grad: Tensor,
    *,
    gradient: int,
    commitment_weight: float,
) -> Tensor:
    name = option(GRADIENTS, gradient)
    _check_quantize_backward(x, codes, indices, quantized_grad, loss_grad, name)
    run = backends.select("quantize_backward", x, codes)
    return run(x, codes, indices, quantized_grad, loss_grad, gradient=name, commitment_weight=commitment_weight)


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
    """Return the gradient of x, given those of the output and the error of `quantize_forward`, in one pass.

        x_grad_n = G_n(quantized_grad_n) + commitment_weight 2 loss_grad (x_n - e_n) / (D |{n : index_n >= 0}|)

    with G the identity for "ste" and lambda R^T for "rotation", see `fastvq.quantize`; zeros for index -1.

    Args:
        x, indices: as in the forward. codes: the codes that it returned.
        quantized_grad: (N, D) in the dtype of x. loss_grad: () in that of the codes.
        gradient: "ste" or "rotation". commitment_weight: factor of the error in the loss.

    Returns:
        (N, D) in the dtype of x, computed in that of the codes.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: van den Oord et al. 2017, section 3.2; Fifty et al. 2024, section 4.2.
    """
    tensors = (x, codes, indices, quantized_grad, loss_grad)
    try:
        return _quantize_backward(*tensors, gradient=GRADIENTS[gradient], commitment_weight=commitment_weight)
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, _check_quantize_backward, *tensors, gradient) from None
