"""Rules that the backends share: dtypes, exact widening, rows that take part, ranges of indices, sizes of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements of the largest temporary tensor of the reference backend."""

SHORTEST = 1e-6
"""Length below which a vector has no direction to rotate from; also the floor of `fastvq.functional.unit_norm`."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor is float64, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def widen(x: Tensor) -> Tensor:
    """Return x in float64, exactly, even under `torch.set_flush_denormal(True)`.

    That setting makes the processor read denormals as zero, so `double()` would lose them. They are then read as
    integers in units of 2^-149.
    """
    wide = x.double()
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or not _flushes_denormals():
        return wide
    bits = x.view(torch.int32) if x.dtype == torch.float32 else x.view(torch.int16).int() << 16
    magnitude = bits & 0x7FFFFFFF
    denormal = magnitude * bits.sign() * torch.full((), 2.0**-149, dtype=torch.float64)
    return torch.where(magnitude < 0x00800000, denormal, wide)


def _flushes_denormals() -> bool:
    smallest = torch.ones((), dtype=torch.int32).view(torch.float32)
    return smallest.double().item() == 0


def row_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask (...) of the rows of x (..., D) that take part: the finite ones that `mask` does not exclude."""
    finite = x.isfinite().all(-1)
    return finite if mask is None else finite & mask


def difference(x: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Return x - codes in the dtype of the codes, zero in the rows that `mask` excludes."""
    return (x.to(codes.dtype) - codes).masked_fill_(~mask, 0)


def half_difference(x: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Return (x - codes) / 2, which overflows for no finite numbers; otherwise as `difference`.

    Nor does the gradient of its square, 2 (x - codes) / 2.
    """
    return torch.add(x.to(codes.dtype) / 2, codes, alpha=-0.5).masked_fill_(~mask, 0)


def power_of_two_below(largest: Tensor) -> Tensor:
    """Return 1, or for numbers beyond the square root of the largest one a power of two that makes them squarable."""
    bits = 48 if largest.dtype == torch.float32 else 496
    return torch.where(largest > 2.0**bits, 2.0 ** (-2 * bits), 1.0).to(largest)


def stages_of(codebooks: Iterable[Tensor]) -> list[Tensor]:
    """Return the codes (K, D) of each stage of a stack, as ops take it: parts (K, D), or (n, K, D) of n stages."""
    return [codes for part in codebooks for codes in ([part] if part.dim() == 2 else part.unbind(0))]


def joined(codebooks: Sequence[Tensor]) -> Tensor | None:
    """Return a stack as one tensor (Q, K, D), or None if the stages differ in size."""
    parts = [part if part.dim() == 3 else part[None] for part in codebooks]
    if len({part.shape[1] for part in parts}) > 1:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_index_range(indices: Tensor, codebook_size: int) -> None:
    """Raise IndexError if an index on the CPU lies outside [-1, codebook_size).

    On other devices the kernel that uses the index asserts: to read it here would wait for the device.
    """
    if indices.device.type == "cpu":
        outside = indices[(indices < -1) | (indices >= codebook_size)]
        if len(outside):
            raise IndexError(f"indices: must lie in [-1, {codebook_size}), got {int(outside[0])}")


def chunk_rows(elements: int) -> int:
    """Return the number of rows, at least one, that a chunk holds at `elements` elements a row."""
    return max(1, CHUNK_ELEMENTS // max(1, elements))
