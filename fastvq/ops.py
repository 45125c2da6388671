"""Every op: its schema, its argument checks, its fake and its choice of backend, once each.

The backend is chosen inside the registered op. torch.compile and torch.export therefore see one opaque node, and a
traced program runs on whatever backend serves the device it meets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends, reference

_library = torch.library.Library("fastvq", "DEF")
_F = TypeVar("_F", bound=Callable[..., Any])


def _op(*, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Registers the decorated function as an op and returns a function of its signature that calls the op.

    `native_<name>` gets the same schema, for the compiled library to implement.
    """

    def register(function: _F) -> _F:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        for op_name in (name, f"native_{name}"):
            _library.define(op_name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Without a graph, which would hold every temporary tensor of a search that nothing differentiates.
        _library.impl(name, torch.no_grad()(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvq::{name}", fake, lib=_library)
        overload = getattr(torch.ops.fastvq, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            return overload(*args, **kwargs)

        call.__name__, call.__qualname__, call.__doc__ = name, name, function.__doc__
        call.__module__, call.__wrapped__ = function.__module__, function  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return register


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_values(name: str, tensor: Tensor, dims: tuple[int, ...], like: str) -> None:
    if tensor.dim() not in dims:
        raise ValueError(f"{name}: must have shape {like}, got {tuple(tensor.shape)}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def _check_same_device(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: must be on the device of {x_name}, {x.device}, got {tensor.device}")


def _check_codes(name: str, codebook: Tensor, x: Tensor) -> None:
    _check_same_device(name, codebook, x)
    if codebook.shape[-1] != x.shape[-1]:
        raise ValueError(f"{name}: must have the dimension of x, D={x.shape[-1]}, got shape {tuple(codebook.shape)}")
    if codebook.shape[-2] == 0:
        raise ValueError(f"{name}: must hold at least one code, got shape {tuple(codebook.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"x: must have at least one dimension D, got shape {tuple(x.shape)}")


def _check_search(x: Tensor, codebook: Tensor, metric: str) -> None:
    _check_values("x", x, (2, 3), "(N, D) or (H, N, D)")
    _check_values("codebook", codebook, (x.dim(),), "(K, D)" if x.dim() == 2 else "(H, K, D) beside x (H, N, D)")
    _check_codes("codebook", codebook, x)
    if x.dim() == 3 and x.shape[0] != codebook.shape[0]:
        raise ValueError(f"codebook: must have the heads of x, H={x.shape[0]}, got shape {tuple(codebook.shape)}")
    if metric not in ("l2", "dot"):
        raise ValueError(f"metric: must be 'l2' or 'dot', got {metric!r}")


def _search_fake(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    _check_search(x, codebook, metric)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@_op(fake=_search_fake)
def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """The exact nearest code of each vector.

        metric="l2"    index_n = argmin_k sum_j (x_nj - e_kj)^2
        metric="dot"   index_n = argmax_k sum_j x_nj e_kj

    The sums are those of IEEE float64 over ascending j, with difference, product and sum each rounded separately; equal
    values resolve to the lowest index. This holds on every backend, device, thread count and batch split. Memory is
    O(N + K D): there is no N x K matrix.

    Args:
        x: vectors (N, D) or (H, N, D); float32, float16, bfloat16 or float64, any strides.
        codebook: codes (K, D) or (H, K, D) on the same device; any of these dtypes, not necessarily that of x.
        metric: "l2" or "dot".

    Returns:
        int64 indices (N,) or (H, N). A row with a NaN or an infinity gets -1. A code with one is never chosen; where no
        finite code is left, every index is -1.

    Raises:
        TypeError: a dtype that isn't listed. ValueError: shapes, devices or a metric that don't fit; each names the
        argument.

    Numerics: docs/exactness.md. Not differentiable: see `fastvq.quantize`.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017, equation 1.
    """
    _check_search(x, codebook, metric)
    return backends.select("search", x.device)(x, codebook, metric=metric)


def _check_residual_search(x: Tensor, codebooks: Tensor) -> None:
    _check_values("x", x, (2,), "(N, D)")
    _check_values("codebooks", codebooks, (3,), "(Q, K, D)")
    _check_codes("codebooks", codebooks, x)
    if codebooks.shape[0] == 0:
        raise ValueError(f"codebooks: must hold at least one level, got shape {tuple(codebooks.shape)}")


def _residual_search_fake(x: Tensor, codebooks: Tensor) -> Tensor:
    _check_residual_search(x, codebooks)
    return x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64)


@_op(fake=_residual_search_fake)
def residual_search(x: Tensor, codebooks: Tensor) -> Tensor:
    """The codes of each vector under residual quantization: each level codes what the levels before it left over.

        r_0 = x,   index_nq = argmin_k |r_q,n - e_qk|^2,   r_{q+1} = float32(r_q - e_q,index)

    The difference is one subtraction in float32; in float64, and then rounded, where an argument is float64.

    Args:
        x: vectors (N, D), as for `search`.
        codebooks: codes (Q, K, D), level by level, on the same device.

    Returns:
        int64 indices (N, Q): the same as calling `search` level by level. -1 as there; a level without a finite code
        leaves the residual as it is.

    Raises:
        TypeError, ValueError: as `search`.

    Source: Zeghidour et al., SoundStream, 2021, algorithm 1.
    """
    _check_residual_search(x, codebooks)
    return backends.select("residual_search", x.device)(x, codebooks)


def _check_indices(indices: Tensor, x: Tensor) -> None:
    _check_int64(indices, x, (x.shape[0],), "(N,)", "x")


def _check_int64(indices: Tensor, x: Tensor, shape: tuple[int, ...], like: str, beside: str) -> None:
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: must be int64, got {indices.dtype}")
    if indices.shape != shape:
        raise ValueError(f"indices: must have shape {like} = {shape} beside {beside}, got {tuple(indices.shape)}")
    _check_same_device("indices", indices, x)


def _check_quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor) -> None:
    _check_values("x", x, (2,), "(N, D)")
    _check_values("codebook", codebook, (2,), "(K, D)")
    _check_codes("codebook", codebook, x)
    _check_indices(indices, x)


def _quantize_forward_fake(
    x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize_forward(x, codebook, indices)
    dtype = reference.compute_dtype(x, codebook)
    codes = x.new_empty((x.shape[0] if keep_codes else 0, x.shape[1]), dtype=dtype)
    return x.new_empty(x.shape), codes, x.new_empty((), dtype=dtype)


@_op(fake=_quantize_forward_fake)
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


GRADIENTS = ("ste", "rotation")


def _check_gradients(x: Tensor, quantized_grad: Tensor, gradient: str) -> None:
    _check_beside("quantized_grad", quantized_grad, x, (x.dtype,))
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: must be one of {', '.join(GRADIENTS)}, got {gradient!r}")


def _check_beside(name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_same_device(name, tensor, x)
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def _check_quantize_backward(
    x: Tensor, codes: Tensor, indices: Tensor, quantized_grad: Tensor, loss_grad: Tensor, gradient: str
) -> None:
    _check_values("x", x, (2,), "(N, D)")
    _check_indices(indices, x)
    _check_beside("codes", codes, x, (torch.float32, torch.float64))
    _check_gradients(x, quantized_grad, gradient)
    _check_same_device("loss_grad", loss_grad, x)
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


@_op(fake=_quantize_backward_fake)
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
    _check_int64(indices, x, (x.shape[0], codebooks.shape[0]), "(N, Q)", "x and codebooks")


def _residual_quantize_forward_fake(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_residual_search(x, codebooks)
    _check_level_indices(indices, x, codebooks)
    levels, dtype = codebooks.shape[0], reference.compute_dtype(x, codebooks)
    residuals = x.new_empty((levels if keep_residuals else 0, *x.shape), dtype=dtype)
    return x.new_empty(x.shape), x.new_empty((levels,), dtype=dtype), residuals


@_op(fake=_residual_quantize_forward_fake)
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
    _check_residual_search(x, codebooks)
    _check_level_indices(indices, x, codebooks)
    return backends.select("residual_quantize_forward", x.device)(x, codebooks, indices, keep_residuals)


def _check_residual_quantize_backward(
    x: Tensor, codebooks: Tensor, indices: Tensor, quantized_grad: Tensor, error_grads: Tensor, gradient: str
) -> None:
    _check_residual_search(x, codebooks)
    _check_level_indices(indices, x, codebooks)
    _check_gradients(x, quantized_grad, gradient)
    dtype = reference.compute_dtype(x, codebooks)
    _check_same_device("error_grads", error_grads, x)
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


@_op(fake=_residual_quantize_backward_fake)
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


def _check_accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> None:
    _check_values("x", x, (2,), "(N, D)")
    _check_indices(indices, x)
    if codebook_size < 1:
        raise ValueError(f"codebook_size: must be at least 1, got {codebook_size}")


def _accumulate_fake(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    _check_accumulate(x, indices, codebook_size)
    return (
        x.new_empty((codebook_size,), dtype=torch.float32),
        x.new_empty((codebook_size, x.shape[1]), dtype=torch.float32),
    )


@_op(fake=_accumulate_fake)
def accumulate(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code has, and their sum.

        counts_k = |{n : index_n = k}|,   sums_k = sum over {n : index_n = k} of x_n

    Args:
        x: vectors (N, D); float32, float16, bfloat16 or float64.
        indices: int64 (N,) in [-1, K); a row with -1 is skipped, whatever it holds.
        codebook_size: K.

    Returns:
        counts (K,) and sums (K, D), float32. Sums are taken in float64 and rounded once; on the CPU in ascending order
        of n, so that the result doesn't depend on the number of threads. Memory is O(N + K D): there is no one-hot.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that don't fit. IndexError: an index out of range, on
        the CPU; elsewhere the device asserts, since looking would mean waiting for it.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 and 7.
    """
    _check_accumulate(x, indices, codebook_size)
    return backends.select("accumulate", x.device)(x, indices, codebook_size)


def _check_ema_update(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, *, decay: float, eps: float
) -> None:
    if codebook.dim() != 2:
        raise ValueError(f"codebook: must have shape (K, D), got {tuple(codebook.shape)}")
    named = [("codebook", codebook), ("cluster_size", cluster_size), ("embed_avg", embed_avg)]
    for name, tensor in [*named, ("counts", counts), ("sums", sums)]:
        shape = codebook.shape if name in ("codebook", "embed_avg", "sums") else codebook.shape[:1]
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: must be float32 whatever the module's dtype is, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        _check_same_device(name, tensor, codebook, "codebook")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: must lie in [0, 1], got {decay}")
    if not eps >= 0:
        raise ValueError(f"eps: must not be negative, got {eps}")


def _ema_update_fake(*tensors: Tensor, decay: float, eps: float) -> None:
    _check_ema_update(*tensors, decay=decay, eps=eps)


@_op(fake=_ema_update_fake, mutates=("codebook", "cluster_size", "embed_avg"))
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
) -> None:
    """One step of the codebook's exponential moving averages, in place.

        N_k <- decay N_k + (1 - decay) counts_k
        m_k <- decay m_k + (1 - decay) sums_k
        e_k <- m_k / N'_k   with   N'_k = (N_k + eps) / (N + K eps) N,   N = sum_k N_k

    A code whose N'_k isn't positive (nothing was ever counted) stays as it is.

    Args:
        codebook: e, (K, D). cluster_size: N, (K,). embed_avg: m, (K, D). All are written.
        counts, sums: of this step, (K,) and (K, D), from `accumulate`.
        decay: share of the old average that is kept, in [0, 1].
        eps: Laplace smoothing of the cluster sizes, not negative.

    All tensors are float32 and on one device. Deterministic for any number of threads.

    Raises:
        TypeError, ValueError: what doesn't fit, by name.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 to 8; smoothing as in Sonnet's VectorQuantizerEMA.
    """
    _check_ema_update(codebook, cluster_size, embed_avg, counts, sums, decay=decay, eps=eps)
    backends.select("ema_update_", codebook.device)(
        codebook, cluster_size, embed_avg, counts, sums, decay=decay, eps=eps
    )
