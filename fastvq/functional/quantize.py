"""Quantization by one codebook as a differentiable function: search, lookup, gradient estimator and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvq.backends.arithmetic import SHORTEST, half_difference, stages_of
from fastvq.backends.support import GRADIENTS
from fastvq.errors import CodebookError
from fastvq.ops import accumulate, quantize_backward, quantize_forward, search


def unit_norm(x: Tensor, shortest: float = SHORTEST) -> Tensor:
    """Return x / max(|x|, shortest) along the last dimension, for cosine similarity by `metric="dot"`.

    Rows have a direction also where the square of their length overflows.
    """
    length = x.norm(dim=-1, keepdim=True)
    factor = _tame(length)
    if factor is not None:
        x = x * factor
        length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(shortest)


def vector_length(x: Tensor) -> Tensor:
    """Return |x| (..., 1), also where its square overflows."""
    length = x.norm(dim=-1, keepdim=True)
    factor = _tame(length)
    return length if factor is None else (x * factor).norm(dim=-1, keepdim=True) / factor


def _tame(length: Tensor) -> Tensor | None:
    """Return the factors of rows with these lengths, 1 or a power of two where the length is infinite.

    On the CPU, None where none is; elsewhere this would wait for the device.
    """
    overflows = length == math.inf
    if _may_read(length) and not bool(overflows.any()):
        return None
    largest = math.frexp(torch.finfo(length.dtype).max)[1]
    return torch.where(overflows, 2.0 ** -(largest * 5 // 8), 1.0).to(length.dtype)


def _may_read(tensor: Tensor) -> bool:
    """Return whether a value may decide what is done: on the CPU, outside of compiled and traced programs."""
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack())


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """Return the codes (..., D) of `indices` (...) in `codebook` (K, D), zeros for index -1. Differentiable."""
    codes = F.embedding(indices.clamp_min(0), codebook)
    return codes.masked_fill((indices < 0).unsqueeze(-1), 0)


class Quantized(NamedTuple):
    """Result of `quantize`."""

    quantized: Tensor  # (..., D), dtype of x
    indices: Tensor  # (...) int64
    loss: Tensor  # () float32, or float64


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    gradient: str = "ste",
    commitment_weight: float | Tensor = 1.0,
    codebook_weight: float | Tensor = 0.0,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> Quantized:
    """Return the nearest code of each vector, with a gradient for the encoder, and the losses of VQ-VAE.

        quantized_n = e_{index_n}
        loss = commitment_weight mean (x - sg[quantized])^2 + codebook_weight mean (sg[x] - quantized)^2

    with means over the D elements of the rows that take part. Non-finite and masked rows are excluded: they have index
    -1, a zero output, a zero gradient and no part in the loss.

    Args:
        x: vectors (..., D), any floating dtype, any leading shape.
        codebook: codes (K, D). It receives a gradient from the loss if codebook_weight isn't zero, never from
            `quantized`.
        metric: "l2" or "dot", as in `search`.
        gradient: how the gradient g of `quantized` reaches x. "ste", straight-through estimator: g itself. "rotation":
            lambda R^T g, as if `quantized` were lambda R x, where R is the rotation that takes x's direction to e's and
            lambda = |e| / |x|, both held constant; if x or e is shorter than 1e-6, g itself.
        commitment_weight, codebook_weight: factors of the two losses, numbers or tensors (). The paper's beta is
            commitment_weight, with codebook_weight = 1.
        mask: bool (...), True for the rows that take part.
        indices: int64 (...), the result of `search` for x if it is known already.

    Returns:
        quantized (..., D), exactly the codes, rounded to x's dtype; indices (...) int64; loss ().

    Raises:
        TypeError, ValueError: as `search`; also for a mask of another dtype or shape, a negative weight or an unknown
        gradient. CodebookError: no code is finite, see `check_some_code`.

    Numerics: losses are computed in float64 if x or codebook is float64, else in float32.
    Memory is O(N D + K D), forward and backward.

    Source: van den Oord et al. 2017, equation 3 (losses, straight-through); Fifty et al., Restructuring Vector
    Quantization with the Rotation Trick, 2024, section 4.2 (rotation).
    """
    check_choices(gradient, commitment_weight=commitment_weight, codebook_weight=codebook_weight)
    found = quantize_errors(x, codebook, metric=metric, gradient=gradient, mask=mask, indices=indices)
    loss = weighted(found.error, commitment_weight)
    if isinstance(codebook_weight, Tensor) or codebook_weight:
        loss = loss + weighted(found.codebook_error, codebook_weight)
    return Quantized(found.quantized, found.indices, loss)


class QuantizedErrors(NamedTuple):
    """Result of `quantize_errors`: both errors () have one value, of which x and the codebook get the gradients."""

    quantized: Tensor
    indices: Tensor
    error: Tensor
    codebook_error: Tensor


def quantize_errors(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    gradient: str = "ste",
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> QuantizedErrors:
    """Return `quantize` with its two losses apart, each without a weight."""
    rows = flatten_rows(x)
    row_mask = None if mask is None else rows_of_mask(mask, x.shape[:-1])
    if indices is None:
        indices = search(rows.detach(), codebook.detach(), metric=metric, mask=row_mask)
    else:
        check_shape(indices, x.shape[:-1])
        indices = indices if x.dim() == 2 else indices.reshape(-1)
        if row_mask is not None:
            indices = indices.masked_fill(~row_mask, -1)
    check_some_code("codebook", indices, codebook)
    if differentiates(rows, codebook):
        quantized, loss, codebook_loss = _Quantize.apply(rows, codebook, indices, gradient)
    else:
        quantized, _, loss = quantize_forward(rows, codebook, indices, False)
        codebook_loss = None
    if x.dim() != 2:
        quantized, indices = quantized.reshape(x.shape), indices.reshape(x.shape[:-1])
    return QuantizedErrors(quantized, indices, loss, loss.detach() if codebook_loss is None else codebook_loss)


def check_some_code(name: str, indices: Tensor, codebook: Tensor | Sequence[Tensor]) -> None:
    """Raise if no row of a batch has a code because no code of a codebook is finite.

    Such a layer would return zeros and learn nothing. The check runs on the CPU, outside of compiled and traced
    programs: elsewhere it would wait for the device at every step, and `health()` reports it. It reads the indices of
    one row unless there is a -1 among them.

    Args:
        name: what the message calls the codebook.
        indices: (N,) of codebook (K, D), or (N, Q) of a sequence of stages, as `residual_search` takes it.
        codebook: the codes.

    Raises:
        CodebookError: a codebook has no finite code.
    """
    # As `_may_read` has it, without a call in each training step.
    if indices.device.type != "cpu" or type(indices) is not Tensor or indices.numel() == 0:
        return
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack():
        return
    stages = not isinstance(codebook, Tensor)
    if int((indices[0] if stages else indices.reshape(-1)[0]).min()) >= 0:
        return
    columns = indices.unbind(1) if stages else (indices,)
    codebooks = [codebook] if isinstance(codebook, Tensor) else stages_of(codebook)
    for stage, (chosen, codes) in enumerate(zip(columns, codebooks, strict=True)):
        if not bool((chosen >= 0).any() or codes.isfinite().all(-1).any()):
            raise CodebookError(
                f"{name}{f'[{stage}]' if stages else ''}: none of its {len(codes)} codes is finite, so that no vector"
                " has a nearest one: it was loaded from such a checkpoint, or the training diverged; load an earlier"
                " one, or lower the learning rate"
            )


def differentiates(*tensors: Tensor) -> bool:
    """Return whether a gradient can flow to a tensor. Otherwise plain ops serve: TorchScript can't save a Function."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def weighted(error: Tensor, weight: float | Tensor) -> Tensor:
    """Return error * weight, without an operation for the weights 0 and 1, unless the weight is a tensor."""
    if isinstance(weight, Tensor):
        return error * weight  # reading it would wait for the device
    if weight == 1:
        return error
    return error * weight if weight else torch.zeros_like(error)


def rows_of_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Check `mask` against the leading shape of the vectors and flatten it to (N,)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: must be bool, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask: must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    return mask.reshape(-1)


def check_choices(gradient: str, **weights: float | Tensor) -> None:
    """Check the name of the gradient estimator and the weights of the losses."""
    if gradient not in tuple(GRADIENTS):
        raise ValueError(f"gradient: must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) and not weight >= 0:  # reading a tensor would wait for the device
            raise ValueError(f"{name}: must not be negative, got {weight}")


def flatten_rows(x: Tensor) -> Tensor:
    """Flatten vectors (..., D) to (N, D)."""
    if x.dim() == 0:
        raise ValueError("x: must have shape (..., D), got a scalar")
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def check_shape(indices: Tensor, shape: torch.Size) -> None:
    """Check the shape of indices that the caller gives."""
    if indices.shape != shape:
        raise ValueError(f"indices: must have shape {tuple(shape)} beside x, got {tuple(indices.shape)}")


class _Quantize(torch.autograd.Function):
    """(quantized, commitment loss, codebook loss) of rows with known indices; the losses have one value.

    The second one is None if the codebook takes no gradient.

    The backward is written out: it keeps no graph of the forward, and neither pass holds more than N x D.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, indices: Tensor, gradient: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        quantized, codes, error = quantize_forward(x, codebook, indices, any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(x, codes, indices)
        ctx.set_materialize_grads(False)  # a loss that is not used has no gradient, rather than zero times infinity
        ctx.gradient, ctx.codebook_shape, ctx.codebook_dtype = gradient, codebook.shape, codebook.dtype
        return quantized, error, error.clone() if ctx.needs_input_grad[1] else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, quantized_grad: Tensor | None, commitment_grad: Tensor | None, codebook_loss_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, codes, indices = ctx.saved_tensors
        need_x, need_codebook = ctx.needs_input_grad[:2]
        x_grad = codebook_grad = None
        if need_x:
            x_grad = quantize_backward(
                x,
                codes,
                indices,
                torch.zeros_like(x) if quantized_grad is None else quantized_grad,
                codes.new_zeros(()) if commitment_grad is None else commitment_grad,
                gradient=ctx.gradient,
                commitment_weight=0.0 if commitment_grad is None else 1.0,
            )
        if need_codebook:
            codebook_grad = codes.new_zeros(ctx.codebook_shape, dtype=ctx.codebook_dtype)
            if codebook_loss_grad is not None:
                row_mask = (indices >= 0)[:, None]
                elements = (row_mask.sum() * x.shape[1]).clamp_min(1)
                pull = half_difference(x, codes, row_mask) * (4 * codebook_loss_grad / elements)
                _, sums = accumulate(pull, indices, len(codebook_grad))
                codebook_grad = (-sums).to(ctx.codebook_dtype)
        return x_grad, codebook_grad, None, None
