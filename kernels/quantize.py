"""The quantize step once the indices are known, and its gradient: one pass over the rows, for all stages.

A row without a code (index -1) is never read. Errors are summed in the arithmetic's type along a row, in float64 over
the rows of a program, and by `_mean` over the programs, always in the same order.

Bytes moved for each of the N D elements in float32, with codes counted where they are gathered, beside those of the
torch operations in fastvq.backends.torch:

    forward              x, codes read; quantized written, codes too if kept               12 or 16      52
    backward, ste        x, codes, grad read; x_grad written                               16            56
    backward, rotation   the same, but long rows are read 3 times, mostly from the cache   16, long 36   180
    Q stages, forward    x read; codes of each stage; quantized, residuals written         8 + 8 Q       76 Q
    Q stages, backward   x, grad read; codes of each stage; x_grad written                 12 + 4 Q      110 Q or 230 Q
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends.arithmetic import check_index_range, compute_dtype
from fastvq.backends.triton import interpreted

from .accumulate import ASSERTING
from .rotation import SHORTEST, factors_of, length_of, unit_of

TILE = 2048
WIDE_TILE = 1024
"""Elements that a program has in registers, a few of each at a time; and of float64."""
WIDEST = 1024
"""Columns of a row that is taken whole."""
BLOCK_PARTIALS = 1024
NUM_WARPS = 4
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """In `dtype` as torch rounds: to the nearest, and float64 by way of float32 to less."""
    if dtype == tl.float64:
        return values.to(tl.float64)
    values = values.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion cuts bits off, and is wrong for subnormals.
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def _forward(
    x, codebooks, indices, quantized, kept, partials, n, dim, size, levels,
    KEEP_CODES: tl.constexpr, KEEP_RESIDUALS: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Look up and sum the codes of each row, and take the squared errors.

    x and quantized are (n, dim), codebooks (levels, size, dim), indices (n, levels), kept (levels, n, dim). partials
    (2, levels, programs) float64 take each program's squares, and the rows with a code.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (d < dim)[None, :]
    at = rows[:, None] * dim + d[None, :]
    programs = tl.num_programs(0) * tl.num_programs(1)
    partials += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    layer = rows
    residual = tl.load(x + at, inside, other=0.0).to(dtype)
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    for level in range(levels):
        code = tl.load(indices + rows * levels + level, rows < n, other=-1)
        tl.device_assert((code >= -1) & (code < size), "indices: must lie in [-1, K)")
        counted = (code >= 0) & (code < size)
        there = counted[:, None] & inside
        row = (code + level * size) * dim
        codes = tl.load(codebooks + row[:, None] + d[None, :], there, other=0.0).to(dtype)
        if KEEP_CODES:
            tl.store(kept + layer[:, None] * dim + d[None, :], codes, inside)
        if KEEP_RESIDUALS:
            tl.store(kept + layer[:, None] * dim + d[None, :], residual, inside)
        layer += n
        residual = residual - codes
        total = total + codes
        # What a row without a code holds is nobody's error, a NaN included.
        error = tl.where(there, residual, 0.0)
        tl.store(partials + level * programs, tl.sum(tl.sum(error * error, 1).to(tl.float64)))
        counted_rows = tl.where(tl.program_id(1) == 0, tl.sum(counted.to(tl.int32)), 0)
        tl.store(partials + (levels + level) * programs, counted_rows.to(tl.float64))
    tl.store(quantized + at, _rounded(total, quantized.dtype.element_ty), inside)


@triton.jit
def _mean(partials, errors, programs, levels, dim, BLOCK: tl.constexpr):
    """Reduce the partials (2, levels, programs) to errors (levels,), one program a stage."""
    level = tl.program_id(0)
    squares = tl.zeros([BLOCK], tl.float64)
    rows = tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, BLOCK):
        place = first + tl.arange(0, BLOCK)
        squares += tl.load(partials + level * programs + place, place < programs, other=0.0)
        rows += tl.load(partials + (levels + level) * programs + place, place < programs, other=0.0)
    elements = tl.maximum(tl.sum(rows) * dim, 1.0)
    tl.store(errors + level, (tl.sum(squares) / elements).to(errors.dtype.element_ty))


@triton.jit
def _pull(pulls, counted_rows, level, dim, dtype: tl.constexpr):
    """Return the factor of x - e in the gradient: pull / (D rows with a code)."""
    elements = tl.maximum(tl.load(counted_rows + level) * dim, 1)
    return tl.load(pulls + level).to(dtype) / elements.to(dtype)


@triton.jit
def _backward(
    x, codes, indices, grad, pulls, counted_rows, x_grad, n, dim, size, levels,
    PULL: tl.constexpr, ROTATE: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x, grad and x_grad (n, dim), indices (n, levels), pulls and counted_rows (levels,).

    Where GATHER codes are codebooks (levels, size, dim), else of one level the codes of the rows (n, dim). Where ROTATE
    a program has whole rows: BLOCK_D >= dim.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (d < dim)[None, :]
    at = rows[:, None] * dim + d[None, :]
    given = tl.load(grad + at, inside, other=0.0).to(dtype)
    if PULL or ROTATE:
        residual = tl.load(x + at, inside, other=0.0).to(dtype)
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    for level in range(levels):
        code = tl.load(indices + rows * levels + level, rows < n, other=-1)
        counted = code >= 0
        row = rows
        if GATHER:
            counted = counted & (code < size)
            row = code + level * size
        there = counted[:, None] & inside
        value = given
        if PULL or ROTATE:
            e = tl.load(codes + row[:, None] * dim + d[None, :], there, other=0.0).to(dtype)
        if ROTATE:
            x_length = length_of(tl.sum(residual * residual, 1))
            e_length = length_of(tl.sum(e * e, 1))
            directed = (x_length >= SHORTEST) & (e_length >= SHORTEST)
            u, v = unit_of(residual, x_length), unit_of(e, e_length)
            along_u, along_v = tl.sum(u * given, 1), tl.sum(v * given, 1)
            # Of nearly opposite vectors little is left: their own sum, not 2 + 2 <u, v>.
            both = tl.sum((u + v) * (u + v), 1)
            stretch = e_length / x_length
            of_u, of_v = factors_of(stretch, along_u, along_v, both)
            turned = stretch[:, None] * given + of_u[:, None] * u + of_v[:, None] * v
            value = tl.where(directed[:, None], turned, given)
        if PULL:
            value = value + _pull(pulls, counted_rows, level, dim, dtype) * (residual - e)
        total = total + tl.where(there, value, 0.0)
        if PULL or ROTATE:
            residual = residual - e
    tl.store(x_grad + at, _rounded(total, x_grad.dtype.element_ty), inside)


@triton.jit
def _load_three(x, codes, grad, at, there, dtype: tl.constexpr):
    return (
        tl.load(x + at, there, other=0.0).to(dtype),
        tl.load(codes + at, there, other=0.0).to(dtype),
        tl.load(grad + at, there, other=0.0).to(dtype),
    )


@triton.jit
def _rotate_long(
    x, codes, indices, grad, pulls, counted_rows, x_grad, n, dim,
    PULL: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`_backward` with ROTATE of one level, for rows that don't fit a program: it reads them three times."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    counted = tl.load(indices + rows, rows < n, other=-1) >= 0
    start = rows[:, None] * dim
    xx = tl.zeros([BLOCK_N], dtype)
    ee, along_u, along_v, both = xx, xx, xx, xx
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        there = counted[:, None] & (d < dim)
        row = tl.load(x + start + d, there, other=0.0).to(dtype)
        e = tl.load(codes + start + d, there, other=0.0).to(dtype)
        xx += tl.sum(row * row, 1)
        ee += tl.sum(e * e, 1)
    x_length, e_length = length_of(xx), length_of(ee)
    directed = (x_length >= SHORTEST) & (e_length >= SHORTEST)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        row, e, g = _load_three(x, codes, grad, start + d, counted[:, None] & (d < dim), dtype)
        u, v = unit_of(row, x_length), unit_of(e, e_length)
        along_u += tl.sum(u * g, 1)
        along_v += tl.sum(v * g, 1)
        both += tl.sum((u + v) * (u + v), 1)
    stretch = e_length / x_length
    of_u, of_v = factors_of(stretch, along_u, along_v, both)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        row, e, g = _load_three(x, codes, grad, start + d, counted[:, None] & (d < dim), dtype)
        u, v = unit_of(row, x_length), unit_of(e, e_length)
        turned = stretch[:, None] * g + of_u[:, None] * u + of_v[:, None] * v
        value = tl.where(directed[:, None], turned, g)
        if PULL:
            value = value + _pull(pulls, counted_rows, 0, dim, dtype) * (row - e)
        tl.store(x_grad + start + d, _rounded(value, x_grad.dtype.element_ty), (rows < n)[:, None] & (d < dim))


def tile(dim: int, wide: bool, gradient: str = "ste") -> tuple[int, int]:
    """(rows, columns) of a program. For a rotation it needs whole rows, and more registers an element."""
    rotate = gradient == "rotation"
    columns = min(WIDEST if rotate and dim <= WIDEST else 256, triton.next_power_of_2(dim))
    elements = (WIDE_TILE if wide else TILE) // (2 if rotate else 1)
    return max(1, min(64, elements // columns)), columns


def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`fastvq.ops.quantize_forward`."""
    quantized, error, codes = _forward_of(x, codebook[None], indices[:, None], keep_codes, False)
    return quantized, codes.view(-1, x.shape[1]), error[0]


def residual_quantize_forward(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastvq.ops.residual_quantize_forward`."""
    return _forward_of(x, codebooks, indices, False, keep_residuals)


def _forward_of(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_codes: bool, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(quantized, errors, what is kept). Nothing waits for the device; an index out of range makes it assert."""
    (n, dim), (levels, size, _) = x.shape, codebooks.shape
    check_index_range(indices.flatten(), size)
    dtype = compute_dtype(x, codebooks)
    wide = dtype == torch.float64
    quantized = x.new_empty(n, dim)
    kept = x.new_empty(levels if keep_codes or keep_residuals else 0, n, dim, dtype=dtype)
    if x.numel() == 0 or levels == 0:
        return quantized.zero_(), x.new_zeros(levels, dtype=dtype), kept
    block_n, block_d = tile(dim, wide)
    grid = triton.cdiv(n, block_n), triton.cdiv(dim, block_d)
    errors = x.new_empty(levels, dtype=dtype)
    with torch.cuda.device_of(x):
        partials = x.new_empty(2, levels, grid[0] * grid[1], dtype=torch.float64)
        _forward[grid](
            x.contiguous(), codebooks.contiguous(), indices.contiguous(), quantized, kept, partials, n, dim, size,
            levels, KEEP_CODES=keep_codes, KEEP_RESIDUALS=keep_residuals, WIDE=wide, BLOCK_N=block_n, BLOCK_D=block_d,
            num_warps=NUM_WARPS, **ASSERTING,
        )  # fmt: skip
        _mean[(levels,)](partials, errors, partials.shape[2], levels, dim, BLOCK=BLOCK_PARTIALS, num_warps=NUM_WARPS)
    return quantized, errors, kept


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
    """`fastvq.ops.quantize_backward`."""
    return _backward_of(
        x, codes, indices[:, None], quantized_grad, loss_grad[None], gradient, commitment_weight, gather=False
    )


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
    """`fastvq.ops.residual_quantize_backward`."""
    if gradient == "ste" or x.shape[1] <= WIDEST:
        return _backward_of(
            x, codebooks, indices, quantized_grad, error_grads, gradient, commitment_weight, gather=True
        )
    # A level turns by inner products of whole residuals, which don't fit: level by level.
    residual, grad = x.to(error_grads.dtype), quantized_grad.to(error_grads.dtype)
    total = torch.zeros_like(residual)
    options: dict[str, Any] = {"gradient": gradient, "commitment_weight": commitment_weight}
    for codebook, level, error_grad in zip(codebooks, indices.unbind(1), error_grads, strict=True):
        codes, _, _ = quantize_forward(residual, codebook, level, False)
        total += quantize_backward(residual, codes, level, grad, error_grad, **options)
        residual = residual - codes
    return total.to(x.dtype)


def _backward_of(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    grad: Tensor,
    error_grads: Tensor,
    gradient: str,
    commitment_weight: float,
    *,
    gather: bool,
) -> Tensor:
    (n, dim), levels = x.shape, indices.shape[1]
    x_grad = x.new_empty(n, dim)
    if x.numel() == 0 or levels == 0:
        return x_grad.zero_()
    wide = error_grads.dtype == torch.float64
    rotate = gradient == "rotation"
    with torch.cuda.device_of(x):
        pulls, counted_rows = error_grads, indices
        if commitment_weight:
            pulls, counted_rows = error_grads * (2 * commitment_weight), (indices >= 0).sum(0)
        pointers = [t.contiguous() for t in (x, codes, indices, grad, pulls, counted_rows)]
        constants: dict[str, Any] = {"PULL": bool(commitment_weight), "WIDE": wide, "num_warps": NUM_WARPS}
        block_n, block_d = tile(dim, wide, gradient)
        if rotate and dim > WIDEST:
            _rotate_long[(triton.cdiv(n, block_n),)](
                *pointers, x_grad, n, dim, BLOCK_N=block_n, BLOCK_D=block_d, **constants
            )
        else:
            _backward[(triton.cdiv(n, block_n), triton.cdiv(dim, block_d))](
                *pointers, x_grad, n, dim, codes.shape[-2], levels, ROTATE=rotate, GATHER=gather, BLOCK_N=block_n,
                BLOCK_D=block_d, **constants,
            )  # fmt: skip
    return x_grad


def aot_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return the shipped cases for `fastvq.kernels.aot`: kernel, types, constants and options."""
    options = {"num_warps": NUM_WARPS, "hot": True}
    mean = {"partials": "*fp64", "errors": "*fp32", "programs": "i32", "levels": "i32", "dim": "i32"}
    cases: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]
    cases = [(_mean, mean, {"BLOCK": BLOCK_PARTIALS}, options)]
    for dtype in ("*fp32", "*bf16", "*fp64"):
        wide = dtype == "*fp64"
        arithmetic = "*fp64" if wide else "*fp32"
        read = {"x": dtype, "indices": "*i64", "n": "i32", "dim": "i32:16"}
        for dim, levels in ((16, 1), (64, 1), (64, 8), (1024, 8)):
            one = {"levels": 1} if levels == 1 else {}
            sizes = {"size": "i32"} | ({} if one else {"levels": "i32"})
            block_n, block_d = tile(dim, wide)
            types = read | sizes | {"codebooks": arithmetic, "quantized": dtype, "kept": arithmetic}
            kept = {"KEEP_CODES": levels == 1, "KEEP_RESIDUALS": levels > 1}
            constants = {"WIDE": wide, "BLOCK_N": block_n, "BLOCK_D": block_d} | one
            # Not hot: what asserts keeps its message on the stack.
            cases.append(
                (_forward, types | {"partials": "*fp64"}, kept | constants, options | ASSERTING | {"hot": False})
            )
            types = read | sizes | {"codes": arithmetic, "grad": dtype, "pulls": arithmetic, "counted_rows": "*i64"}
            for gradient in ("ste", "rotation"):
                block_n, block_d = tile(dim, wide, gradient)
                constants = {"WIDE": wide, "BLOCK_N": block_n, "BLOCK_D": block_d, "GATHER": levels > 1} | one
                cases.append(
                    (
                        _backward,
                        types | {"x_grad": dtype},
                        {"PULL": True, "ROTATE": gradient == "rotation", **constants},
                        options,
                    )
                )
        block_n, block_d = tile(2048, wide, "rotation")
        types = read | {"codes": arithmetic, "grad": dtype, "pulls": arithmetic, "counted_rows": "*i64"}
        constants = {"PULL": True, "WIDE": wide, "BLOCK_N": block_n, "BLOCK_D": block_d}
        cases.append((_rotate_long, types | {"x_grad": dtype}, constants, options))
    return cases
