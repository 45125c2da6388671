"""Argument checks that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.support import DTYPES, GRADIENTS, METRICS


def check_values(name: str, tensor: Tensor, dims: tuple[int, ...], like: str) -> None:
    """Check the number of dimensions and the dtype of x or a codebook."""
    if tensor.dim() not in dims:
        raise ValueError(f"{name}: must have shape {like}, got {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    """Check that a tensor is on the device of x."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: must be on the device of {x_name}, {x.device}, got {tensor.device}")


def check_codes(name: str, codebook: Tensor, x: Tensor) -> None:
    """Check the device and the shape of a codebook against x."""
    check_same_device(name, codebook, x)
    if codebook.shape[-1] != x.shape[-1]:
        raise ValueError(f"{name}: must have the dimension of x, D={x.shape[-1]}, got shape {tuple(codebook.shape)}")
    if codebook.shape[-2] == 0:
        raise ValueError(f"{name}: must hold at least one code, got shape {tuple(codebook.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"x: must have at least one dimension D, got shape {tuple(x.shape)}")


def check_metric(metric: str) -> None:
    """Check the name of a metric."""
    if metric not in tuple(METRICS):  # which an argument that has no hash can be compared with
        raise ValueError(f"metric: must be 'l2' or 'dot', got {metric!r}")


def check_indices(indices: Tensor, x: Tensor) -> None:
    """Check indices (N,) of x (N, D)."""
    check_int64(indices, x, (x.shape[0],), "(N,)", "x")


def check_int64(indices: Tensor, x: Tensor, shape: tuple[int, ...], like: str, beside: str) -> None:
    """Check dtype, shape and device of indices."""
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: must be int64, got {indices.dtype}")
    if indices.shape != shape:
        raise ValueError(f"indices: must have shape {like} = {shape} beside {beside}, got {tuple(indices.shape)}")
    check_same_device("indices", indices, x)


def check_mask(mask: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check dtype, shape and device of a mask."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: must be bool, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask: must have shape {tuple(shape)} beside x, got {tuple(mask.shape)}")
    check_same_device("mask", mask, x)


def check_like(name: str, tensor: Tensor | None, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check an optional argument that has one shape and one dtype."""
    if tensor is None:
        return
    check_same_device(name, tensor, x)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: must be {dtype} of shape {tuple(shape)}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_gradients(x: Tensor, quantized_grad: Tensor, gradient: str) -> None:
    """Check the gradient of the output and the name of the gradient estimator."""
    check_beside("quantized_grad", quantized_grad, x, (x.dtype,))
    if gradient not in tuple(GRADIENTS):
        raise ValueError(f"gradient: must be one of {', '.join(GRADIENTS)}, got {gradient!r}")


def check_beside(name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check that a tensor has the device and the shape of x, and one of `dtypes`."""
    check_same_device(name, tensor, x)
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
