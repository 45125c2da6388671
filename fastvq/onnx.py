"""Export of layers as ONNX files whose indices in onnxruntime are exact.

Needs the extra "onnx". `export` writes a file. `TRANSLATIONS`, for `torch.onnx.export(..., custom_translation_table=)`,
maps fastvq's ops to ONNX functions in models that are exported by other means.

A search is the definition itself (docs/exactness.md): a loop over dimensions that adds float64 squares one by one, for
CODES_AT_ONCE codes at a time, and keeps the nearest code found. It needs memory for N x 256 float64 and runs at the
speed of elementwise operations, far slower than `fastvq.search`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.backends.support import METRICS
from fastvq.extras import require
from fastvq.files import StrPath, whole

onnxscript = require("onnxscript", "onnx")
from onnxscript import BOOL, DOUBLE, FLOAT, INT64  # noqa: E402

op = onnxscript.opset18

CODES_AT_ONCE = 256
"""Number of codes that a row is compared with at a time. It bounds the memory of a search."""


def export(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: StrPath,
    *,
    method: str = "forward",
    dynamic_shapes: Sequence[Any] | None = None,
    **options: Any,
) -> None:
    """Write `module`, or one of its methods, as an ONNX file. The file appears whole or not at all.

    Args:
        module: a quantizer, or a model that contains quantizers, in eval mode.
        example: the argument, or the tuple of arguments, to trace it with.
        path: path of the file.
        method: name of the method: "forward", "encode", "get_output_from_indices" ...
        dynamic_shapes: for each argument, the axes of variable length, as for `torch.export.export`; by default the
            first axis of each.
        options: arguments of `torch.onnx.export`: input_names (by default those of the method's arguments),
            output_names, opset_version (18 or later) ...

    Raises:
        ValueError: the module is in training mode.
        TypeError: the module has no such method.
        torch.onnx.OnnxExporterError: a part of it, such as learning, has no ONNX form.

    Numerics: indices equal those of `fastvq.search`; non-finite rows get -1. Losses are summed in float64, in the
    runtime's order.
    """
    if module.training:
        raise ValueError("module: must be in eval mode, got one in training mode: call .eval() first")
    if not callable(getattr(module, method, None)):
        raise TypeError(f"method: must name a method of {type(module).__name__}, got {method!r}")
    arguments = example if isinstance(example, tuple) else (example,)
    if dynamic_shapes is None:
        dynamic_shapes = [{0: torch.export.Dim.DYNAMIC} for _ in arguments]
    names = list(inspect.signature(getattr(module, method)).parameters)[: len(arguments)]
    program = torch.onnx.export(
        _Call(module, method).eval(),
        arguments,
        dynamo=True,
        dynamic_shapes=(tuple(dynamic_shapes),),
        custom_translation_table=TRANSLATIONS,
        verbose=False,
        **{"input_names": names, **options},
    )
    assert program is not None
    with whole(path) as file:
        program.save(file.name)


class _Call(nn.Module):
    """Module whose forward is a method of another."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Tensor) -> Any:
        return getattr(self.module, self.method)(*arguments)


_functions = onnxscript.values.Opset("fastvq", 1)


@onnxscript.script(_functions)
def nearest(x: DOUBLE, codebook: DOUBLE, usable: BOOL, first: INT64, dot: BOOL, size: int, chunks: int) -> INT64:
    """Return the index (H, N) of the nearest usable code of each row of x (H, N, D).

    The nearest code has the smallest sum_j (x_j - e_kj)^2, or the largest sum_j x_j e_kj, among the `usable` (H, K)
    codes of the codebook (H, K, D), which are taken `size` at a time. It is `first` (H, 1), the first usable code,
    where all sums are infinite.
    """
    columns = op.Unsqueeze(op.Transpose(x, perm=[2, 0, 1]), [-1])  # [D, H, N, 1]
    dimensions = op.Squeeze(op.Shape(x, start=2, end=3), [0])
    zero = op.CastLike(op.Constant(value_float=0.0), x)
    infinity = op.CastLike(op.Constant(value_float=float("inf")), x)
    least = op.Expand(infinity, op.Shape(x, start=0, end=2))
    index = op.Expand(first, op.Shape(x, start=0, end=2))
    for chunk in range(chunks):
        begin = op.Reshape(chunk * size, [1])
        end = begin + size
        codes = op.Unsqueeze(op.Transpose(op.Slice(codebook, begin, end, [1]), perm=[2, 0, 1]), [2])  # [D, H, 1, C]
        allowed = op.Unsqueeze(op.Slice(usable, begin, end, [1]), [1])  # [H, 1, C]
        sums = op.Expand(zero, op.Shape(op.Or(allowed, op.IsNaN(op.Unsqueeze(least, [-1])))))  # [H, N, C]
        for j in range(dimensions):
            if dot:
                sums = sums - op.Gather(columns, j) * op.Gather(codes, j)
            else:
                difference = op.Gather(columns, j) - op.Gather(codes, j)
                sums = sums + difference * difference
        sums = op.Where(op.And(allowed, op.Not(op.IsNaN(sums))), sums, infinity)
        smallest = op.ReduceMin(sums, [-1], keepdims=0)
        closer = smallest < least
        index = op.Where(closer, op.ArgMin(sums, axis=-1, keepdims=0) + begin, index)
        least = op.Where(closer, smallest, least)
    return index


def _finite(x: Any) -> Any:
    """Return the mask of rows, along the last axis, that hold neither NaN nor infinity."""
    non_finite = op.Cast(op.Or(op.IsNaN(x), op.IsInf(x)), to=INT64.dtype)
    return op.Not(op.Cast(op.ReduceMax(non_finite, [-1], keepdims=0), to=BOOL.dtype))


def _indices(x: Any, codebook: Any, size: int, metric: int) -> Any:
    """Return the indices (H, N) of x (H, N, D) among `size` codes (H, K, D), of any dtypes."""
    x, codebook = op.Cast(x, to=DOUBLE.dtype), op.Cast(codebook, to=DOUBLE.dtype)
    usable = op.Cast(_finite(codebook), to=INT64.dtype)
    index = nearest(
        x,
        codebook,
        op.Cast(usable, to=BOOL.dtype),
        op.ArgMax(usable, axis=-1, keepdims=1),  # the first of the largest
        op.Cast(op.Constant(value_int=int(metric == METRICS["dot"])), to=BOOL.dtype),
        size=min(CODES_AT_ONCE, size),
        chunks=-(-size // CODES_AT_ONCE),
    )
    any_usable = op.Cast(op.ReduceMax(usable, [-1], keepdims=1), to=BOOL.dtype)  # [H, 1]
    return op.Where(op.And(_finite(x), any_usable), index, _integer(-1))


def _integer(value: int) -> Any:
    return op.Constant(value_int=value)


def search(x, codebook, metric=METRICS["l2"], mask=None):  # type: ignore[no-untyped-def]
    """Translate `fastvq::search`."""
    size = codebook.shape[-2]
    if len(x.shape) == 3:
        index = _indices(x, codebook, size, metric)
    else:
        index = op.Squeeze(_indices(op.Unsqueeze(x, [0]), op.Unsqueeze(codebook, [0]), size, metric), [0])
    return index if mask is None else op.Where(mask, index, _integer(-1))


def residual_search(x, codebooks, metric=0, mask=None):  # type: ignore[no-untyped-def]
    """Translate `fastvq::residual_search`."""
    dtype = _compute_dtype(x, codebooks[0])
    residual, stages = x, []
    for codebook, size in _stages(codebooks):
        index = _indices(op.Unsqueeze(residual, [0]), op.Unsqueeze(codebook, [0]), size, metric)
        index = op.Squeeze(index, [0])
        stages.append(op.Unsqueeze(index, [-1]))
        residual = op.Cast(op.Cast(residual, to=dtype) - _lookup(codebook, index, dtype), to=FLOAT.dtype)
        dtype = codebooks[0].dtype if codebooks[0].dtype == DOUBLE.dtype else FLOAT.dtype
    indices = op.Concat(*stages, axis=-1)
    return indices if mask is None else op.Where(op.Unsqueeze(mask, [-1]), indices, _integer(-1))


def _stages(codebooks: Any) -> Iterator[tuple[Any, int]]:
    """Yield the codes (K, D) of each stage, and K."""
    for part in codebooks:
        if len(part.shape) == 2:
            yield part, part.shape[0]
            continue
        for stage in range(part.shape[0]):
            yield op.Gather(part, _integer(stage), axis=0), part.shape[1]


def _lookup(codebook: Any, index: Any, dtype: int) -> Any:
    absent = op.Unsqueeze(op.Less(index, _integer(0)), [-1])
    codes = op.Gather(op.Cast(codebook, to=dtype), op.Max(index, _integer(0)), axis=0)
    return op.Where(absent, op.Cast(op.Constant(value_float=0.0), to=dtype), codes)


def quantize_forward(x, codebook, indices, keep_codes):  # type: ignore[no-untyped-def]
    """Translate `fastvq::quantize_forward`."""
    dtype = _compute_dtype(x, codebook)
    codes = _lookup(codebook, indices, dtype)
    kept = codes if keep_codes else op.Slice(codes, [0], [0], [0])
    return op.CastLike(codes, x), kept, _error(x, codes, indices, x.shape[-1], dtype)


def residual_quantize_forward(x, codebooks, indices, keep_residuals):  # type: ignore[no-untyped-def]
    """Translate `fastvq::residual_quantize_forward`."""
    dtype = _compute_dtype(x, codebooks[0])
    residual = op.Cast(x, to=dtype)
    total = None
    errors, residuals = [], []
    for stage, (codebook, _) in enumerate(_stages(codebooks)):
        index = op.Gather(indices, _integer(stage), axis=1)
        codes = _lookup(codebook, index, dtype)
        errors.append(op.Unsqueeze(_error(residual, codes, index, x.shape[-1], dtype), [0]))
        residuals.append(op.Unsqueeze(residual, [0]))
        residual = residual - codes
        total = codes if total is None else total + codes
    kept = op.Concat(*residuals, axis=0)
    if not keep_residuals:
        kept = op.Slice(kept, [0], [0], [0])
    return op.CastLike(total, x), op.Concat(*errors, axis=0), kept


def _error(x: Any, codes: Any, index: Any, dim: int, dtype: int) -> Any:
    """Return the mean of (x - codes)^2 over the elements of the rows that have an index."""
    mask = op.Unsqueeze(op.GreaterOrEqual(index, _integer(0)), [-1])
    zero = op.Cast(op.Constant(value_float=0.0), to=dtype)
    difference = op.Cast(op.Where(mask, op.Cast(x, to=dtype) - codes, zero), to=DOUBLE.dtype)
    rows = op.ReduceSum(op.Cast(mask, to=INT64.dtype), keepdims=0)
    elements = op.Max(rows * dim, _integer(1))
    return op.Cast(op.ReduceSum(difference * difference, keepdims=0) / op.Cast(elements, to=DOUBLE.dtype), to=dtype)


def _compute_dtype(x: Any, codebook: Any) -> int:
    """Return ONNX's number of float64 if either argument is float64, else that of float32."""
    return DOUBLE.dtype if DOUBLE.dtype in (x.dtype, codebook.dtype) else FLOAT.dtype


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fastvq.search.default: search,
    torch.ops.fastvq.residual_search.default: residual_search,
    torch.ops.fastvq.quantize_forward.default: quantize_forward,
    torch.ops.fastvq.residual_quantize_forward.default: residual_quantize_forward,
}
"""The ONNX form of each op of fastvq that an exported layer can contain."""
