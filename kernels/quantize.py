"""The op `quantize`, forward and backward: one pass over the rows for all stages, once the indices are known.

An excluded row (index -1) is never read. Errors are summed in the dtype of the arithmetic along a row, in float64 over
the rows of a program, and by `_mean` over the programs, always in the same order.

Bytes moved for each of the N D elements in float32, including the codes where they are gathered, compared with the
operations of fastvq.backends.torch in the last column:

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
from .rotation import SHORTEST, SHRINK, both_of, factors_of, shrink_of

TILE = 2048
WIDE_TILE = 1024
"""Elements of a tile, which a program holds in registers several times over; WIDE_TILE in float64."""
WIDEST = 1024
"""Columns of the longest row that a program holds whole."""
BLOCK_PARTIALS = 1024
NUM_WARPS = 4
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """Round to `dtype` as torch does: to the nearest, and from float64 to a half precision by way of float32."""
    if dtype == tl.float64:
        return values.to(tl.float64)
    values = values.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion truncates, and is wrong for subnormals.
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def _forward(
    x, codebooks, indices, quantized, kept, partials, n, dim, size, stages,
    KEEP_CODES: tl.constexpr, KEEP_RESIDUALS: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Look up and sum the codes of each row, and take the squared errors.

    x and quantized are (n, dim), codebooks (stages, size, dim), indices (n, stages), kept (stages, n, dim). partials
    (2, stages, programs) float64 take the squared errors and the number of quantized rows
    of each program.
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
    for stage in range(stages):
        code = tl.load(indices + rows * stages + stage, rows < n, other=-1)
        tl.device_assert((code >= -1) & (code < size), "indices: must lie in [-1, K)")
        mask = (code >= 0) & (code < size)
        there = mask[:, None] & inside
        row = (code + stage * size) * dim
        codes = tl.load(codebooks + row[:, None] + d[None, :], there, other=0.0).to(dtype)
        if KEEP_CODES:
            tl.store(kept + layer[:, None] * dim + d[None, :], codes, inside)
        if KEEP_RESIDUALS:
            tl.store(kept + layer[:, None] * dim + d[None, :], residual, inside)
        layer += n
        residual = residual - codes
        total = total + codes
        # An excluded row has no error, even if it holds a NaN.
        error = tl.where(there, residual, 0.0)
        tl.store(partials + stage * programs, tl.sum(tl.sum(error * error, 1).to(tl.float64)))
        quantized_rows = tl.where(tl.program_id(1) == 0, tl.sum(mask.to(tl.int32)), 0)
        tl.store(partials + (stages + stage) * programs, quantized_rows.to(tl.float64))
    tl.store(quantized + at, _rounded(total, quantized.dtype.element_ty), inside)


@triton.jit
def _mean(partials, errors, programs, stages, dim, BLOCK: tl.constexpr):
    """Reduce the partials (2, stages, programs) to errors (stages,), one program a stage."""
    stage = tl.program_id(0)
    squares = tl.zeros([BLOCK], tl.float64)
    rows = tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, BLOCK):
        place = first + tl.arange(0, BLOCK)
        squares += tl.load(partials + stage * programs + place, place < programs, other=0.0)
        rows += tl.load(partials + (stages + stage) * programs + place, place < programs, other=0.0)
    elements = tl.maximum(tl.sum(rows) * dim, 1.0)
    tl.store(errors + stage, (tl.sum(squares) / elements).to(errors.dtype.element_ty))


@triton.jit
def _pull(pulls, quantized_rows, stage, dim, dtype: tl.constexpr):
    """Return the factor of x - e in the gradient: pull / (D times the number of quantized rows)."""
    elements = tl.maximum(tl.load(quantized_rows + stage) * dim, 1)
    return tl.load(pulls + stage).to(dtype) / elements.to(dtype)


@triton.jit
def _backward(
    x, codes, indices, grad, pulls, quantized_rows, x_grad, n, dim, size, stages,
    PULL: tl.constexpr, ROTATE: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the gradient x_grad (n, dim) of x from grad (n, dim), summed over the stages.

    indices are (n, stages), pulls and quantized_rows (stages,). With GATHER, codes are the codebooks (stages, size,
    dim); without it there is one stage, and codes (n, dim) are those of the rows. With ROTATE a program holds whole
    rows: BLOCK_D >= dim.
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
    for stage in range(stages):
        code = tl.load(indices + rows * stages + stage, rows < n, other=-1)
        mask = code >= 0
        row = rows
        if GATHER:
            mask = mask & (code < size)
            row = code + stage * size
        there = mask[:, None] & inside
        value = given
        if PULL or ROTATE:
            e = tl.load(codes + row[:, None] * dim + d[None, :], there, other=0.0).to(dtype)
        if ROTATE:
            x_shrink, e_shrink = shrink_of(tl.max(tl.abs(residual), 1)), shrink_of(tl.max(tl.abs(e), 1))
            small, small_e = residual * x_shrink[:, None], e * e_shrink[:, None]
            x_length, e_length = tl.sqrt(tl.sum(small * small, 1)), tl.sqrt(tl.sum(small_e * small_e, 1))
            directed = (x_length >= SHORTEST * x_shrink) & (e_length >= SHORTEST * e_shrink)
            z = both_of(small, small_e, x_length, e_length)
            xz, zz = tl.sum(small * z, 1), tl.sum(z * z, 1)
            xg, eg, zg = tl.sum(small * given, 1), tl.sum(small_e * given, 1), tl.sum(z * given, 1)
            of_x, of_z = factors_of(xz, zz, xg, eg, zg, x_length, e_length)
            # Two forms of one product: for each of these tiles, ptxas spills registers in the other.
            if BLOCK_N == 1:
                along_x = of_x[:, None] * small
            else:
                along_x = (of_x * x_shrink)[:, None] * residual
            turned = given + along_x + of_z[:, None] * z
            # lambda itself may overflow where its product with a small gradient does not.
            turned = turned * (e_length / x_length)[:, None] * (x_shrink / e_shrink)[:, None]
            value = tl.where(directed[:, None], turned, given)
        if PULL:
            value = value + 2 * _pull(pulls, quantized_rows, stage, dim, dtype) * (0.5 * residual - 0.5 * e)
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
    x, codes, indices, grad, pulls, quantized_rows, x_grad, n, dim,
    PULL: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Do what `_backward` does with ROTATE and one stage, for rows too long for a program: read them three times."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = tl.load(indices + rows, rows < n, other=-1) >= 0
    start = rows[:, None] * dim
    xx = tl.zeros([BLOCK_N], dtype)
    ee, xz, zz, xg, eg, zg = xx, xx, xx, xx, xx, xx
    giant_x, giant_e = xx, xx
    largest_x, largest_e = xx, xx
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        there = mask[:, None] & (d < dim)
        row = tl.load(x + start + d, there, other=0.0).to(dtype)
        e = tl.load(codes + start + d, there, other=0.0).to(dtype)
        xx += tl.sum(row * row, 1)
        ee += tl.sum(e * e, 1)
        giant_x += tl.sum((row * SHRINK) * (row * SHRINK), 1)
        giant_e += tl.sum((e * SHRINK) * (e * SHRINK), 1)
        largest_x = tl.maximum(largest_x, tl.max(tl.abs(row), 1))
        largest_e = tl.maximum(largest_e, tl.max(tl.abs(e), 1))
    x_shrink, e_shrink = shrink_of(largest_x), shrink_of(largest_e)
    x_length = tl.sqrt(tl.where(x_shrink < 1, giant_x, xx))
    e_length = tl.sqrt(tl.where(e_shrink < 1, giant_e, ee))
    directed = (x_length >= SHORTEST * x_shrink) & (e_length >= SHORTEST * e_shrink)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        row, e, g = _load_three(x, codes, grad, start + d, mask[:, None] & (d < dim), dtype)
        row, e = row * x_shrink[:, None], e * e_shrink[:, None]
        z = both_of(row, e, x_length, e_length)
        xz += tl.sum(row * z, 1)
        zz += tl.sum(z * z, 1)
        xg += tl.sum(row * g, 1)
        eg += tl.sum(e * g, 1)
        zg += tl.sum(z * g, 1)
    of_x, of_z = factors_of(xz, zz, xg, eg, zg, x_length, e_length)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        row, e, g = _load_three(x, codes, grad, start + d, mask[:, None] & (d < dim), dtype)
        small = row * x_shrink[:, None]
        z = both_of(small, e * e_shrink[:, None], x_length, e_length)
        turned = g + of_x[:, None] * small + of_z[:, None] * z
        turned = turned * (e_length / x_length)[:, None] * (x_shrink / e_shrink)[:, None]
        value = tl.where(directed[:, None], turned, g)
        if PULL:
            value = value + 2 * _pull(pulls, quantized_rows, 0, dim, dtype) * (0.5 * row - 0.5 * e)
        tl.store(x_grad + start + d, _rounded(value, x_grad.dtype.element_ty), (rows < n)[:, None] & (d < dim))


def tile(dim: int, wide: bool, gradient: str = "ste") -> tuple[int, int]:
    """Return (rows, columns) of a program.

    The rotation needs whole rows where they fit, and more registers for an element.
    """
    rotate = gradient == "rotation"
    columns = min(WIDEST if rotate and dim <= WIDEST else 256, triton.next_power_of_2(dim))
    elements = (WIDE_TILE if wide else TILE) // (2 if rotate else 1)
    return max(1, min(64, elements // columns)), columns


def quantize_forward(x: Tensor, codebook: Tensor, indices: Tensor, keep_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `fastvq.ops.quantize_forward`."""
    quantized, error, codes = run_forward(x, codebook[None], indices[:, None], keep_codes, False)
    return quantized, codes.view(-1, x.shape[1]), error[0]


def run_forward(
    x: Tensor, codebooks: Tensor, indices: Tensor, keep_codes: bool, keep_residuals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel over the stages and return (quantized, errors, codes or residuals).

    Nothing waits for the device; an index out of range makes it assert.
    """
    (n, dim), (stages, size, _) = x.shape, codebooks.shape
    check_index_range(indices.flatten(), size)
    dtype = compute_dtype(x, codebooks)
    wide = dtype == torch.float64
    quantized = x.new_empty(n, dim)
    kept = x.new_empty(stages if keep_codes or keep_residuals else 0, n, dim, dtype=dtype)
    if x.numel() == 0 or stages == 0:
        return quantized.zero_(), x.new_zeros(stages, dtype=dtype), kept
    block_n, block_d = tile(dim, wide)
    grid = triton.cdiv(n, block_n), triton.cdiv(dim, block_d)
    errors = x.new_empty(stages, dtype=dtype)
    with torch.cuda.device_of(x):
        partials = x.new_empty(2, stages, grid[0] * grid[1], dtype=torch.float64)
        _forward[grid](
            x.contiguous(), codebooks.contiguous(), indices.contiguous(), quantized, kept, partials, n, dim, size,
            stages, KEEP_CODES=keep_codes, KEEP_RESIDUALS=keep_residuals, WIDE=wide, BLOCK_N=block_n, BLOCK_D=block_d,
            num_warps=NUM_WARPS, **ASSERTING,
        )  # fmt: skip
        _mean[(stages,)](partials, errors, partials.shape[2], stages, dim, BLOCK=BLOCK_PARTIALS, num_warps=NUM_WARPS)
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
    """Implement `fastvq.ops.quantize_backward`."""
    return run_backward(
        x, codes, indices[:, None], quantized_grad, loss_grad[None], gradient, commitment_weight, gather=False
    )


def run_backward(
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
    """Run the backward kernel over the stages and return the gradient of x.

    With `gather`, `codes` are the codebooks of the stages; without it, the codes of the rows of the one stage.
    """
    (n, dim), stages = x.shape, indices.shape[1]
    x_grad = x.new_empty(n, dim)
    if x.numel() == 0 or stages == 0:
        return x_grad.zero_()
    wide = error_grads.dtype == torch.float64
    rotate = gradient == "rotation"
    with torch.cuda.device_of(x):
        pulls, quantized_rows = error_grads, indices
        if commitment_weight:
            pulls, quantized_rows = error_grads * (2 * commitment_weight), (indices >= 0).sum(0)
        pointers = [t.contiguous() for t in (x, codes, indices, grad, pulls, quantized_rows)]
        constants: dict[str, Any] = {"PULL": bool(commitment_weight), "WIDE": wide, "num_warps": NUM_WARPS}
        block_n, block_d = tile(dim, wide, gradient)
        if rotate and dim > WIDEST:
            _rotate_long[(triton.cdiv(n, block_n),)](
                *pointers, x_grad, n, dim, BLOCK_N=block_n, BLOCK_D=block_d, **constants
            )
        else:
            _backward[(triton.cdiv(n, block_n), triton.cdiv(dim, block_d))](
                *pointers, x_grad, n, dim, codes.shape[-2], stages, ROTATE=rotate, GATHER=gather, BLOCK_N=block_n,
                BLOCK_D=block_d, **constants,
            )  # fmt: skip
    return x_grad


def aot_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return the shipped cases for `fastvq.kernels.aot`: kernel, types, constants and options."""
    options = {"num_warps": NUM_WARPS, "hot": True}
    mean = {"partials": "*fp64", "errors": "*fp32", "programs": "i32", "stages": "i32", "dim": "i32"}
    cases: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]
    cases = [(_mean, mean, {"BLOCK": BLOCK_PARTIALS}, options)]
    for dtype in ("*fp32", "*bf16", "*fp64"):
        wide = dtype == "*fp64"
        arithmetic = "*fp64" if wide else "*fp32"
        read = {"x": dtype, "indices": "*i64", "n": "i32", "dim": "i32:16"}
        for dim, stages in ((16, 1), (64, 1), (64, 8), (1024, 8)):
            one = {"stages": 1} if stages == 1 else {}
            sizes = {"size": "i32"} | ({} if one else {"stages": "i32"})
            block_n, block_d = tile(dim, wide)
            types = read | sizes | {"codebooks": arithmetic, "quantized": dtype, "kept": arithmetic}
            kept = {"KEEP_CODES": stages == 1, "KEEP_RESIDUALS": stages > 1}
            constants = {"WIDE": wide, "BLOCK_N": block_n, "BLOCK_D": block_d} | one
            # Not hot: a kernel with an assertion keeps its message on the stack.
            cases.append(
                (_forward, types | {"partials": "*fp64"}, kept | constants, options | ASSERTING | {"hot": False})
            )
            types = read | sizes | {"codes": arithmetic, "grad": dtype, "pulls": arithmetic, "quantized_rows": "*i64"}
            for gradient in ("ste", "rotation"):
                block_n, block_d = tile(dim, wide, gradient)
                constants = {"WIDE": wide, "BLOCK_N": block_n, "BLOCK_D": block_d, "GATHER": stages > 1} | one
                cases.append(
                    (
                        _backward,
                        types | {"x_grad": dtype},
                        {"PULL": True, "ROTATE": gradient == "rotation", **constants},
                        options,
                    )
                )
        block_n, block_d = tile(2048, wide, "rotation")
        types = read | {"codes": arithmetic, "grad": dtype, "pulls": arithmetic, "quantized_rows": "*i64"}
        constants = {"PULL": True, "WIDE": wide, "BLOCK_N": block_n, "BLOCK_D": block_d}
        cases.append((_rotate_long, types | {"x_grad": dtype}, constants, options))
    return cases
