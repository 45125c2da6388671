"""Projections between the dimensions of vectors and codes, and rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvq.precision import widest_dtype

from .arguments import check_sizes


class Projected:
    """Mixin of modules whose children project_in and project_out surround a codebook, and may be any modules."""

    _modules: dict[str, nn.Module | None]

    @property
    def has_projections(self) -> bool:
        """True unless both are identities as of now."""
        modules = self._modules
        return not (type(modules["project_in"]) is type(modules["project_out"]) is nn.Identity)


def projections(
    dim: int, codebook_dim: int, *, bias: bool = True, layernorm: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Return (project_in, project_out) between dim and codebook_dim; identities if the dimensions are equal.

    With `layernorm`, a layer norm follows the first projection.

    Source: Yu et al., Vector-quantized Image Modeling with Improved VQGAN, 2021, section 3.2 (low-dimensional codes).

    Raises:
        ValueError: a dimension is no integer of at least 1.
    """
    check_sizes(dim=dim, codebook_dim=codebook_dim)
    if dim == codebook_dim:
        return nn.Identity(), nn.Identity()
    into: nn.Module = nn.Linear(dim, codebook_dim, bias=bias)
    if layernorm:
        into = nn.Sequential(into, nn.LayerNorm(codebook_dim))
    return into, nn.Linear(codebook_dim, dim, bias=bias)


def project_codes_out(project_out: nn.Module, codes: Tensor, mask: Tensor) -> Tensor:
    """Return project_out(codes (..., D)) in the projection's dtype, zero where mask (...) is False.

    Excluded rows are zero because the projection's bias alone is no output. Codes are made contiguous first: the last
    bits of a matrix product may depend on strides.
    """
    if not isinstance(project_out, nn.Identity):
        codes = project_out(codes.to(parameter_dtype(project_out, default=codes.dtype)).contiguous())
    return codes.masked_fill(~mask.unsqueeze(-1), 0)


def project_rows_in(project_in: nn.Module, rows: Tensor) -> Tensor:
    """Return project_in(rows (..., D)) in the dtype of the rows, computed in that of the projection."""
    return projected_rows(project_in, rows).to(rows.dtype)


def projected_rows(project_in: nn.Module, rows: Tensor) -> Tensor:
    """Return project_in(rows (..., D)) in the projection's dtype, whatever that of the rows."""
    if type(project_in) is nn.Identity:
        return rows
    return project_in(rows.to(parameter_dtype(project_in, default=rows.dtype)))


def parameter_dtype(module: nn.Module, *, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the module's first floating-point parameter, or `default` if it has none."""
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), default)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return x (..., d) @ rotation (d, d) in float64 where the device supports it.

    Neither TF32 nor autocast can then change an index.
    """
    dtype = widest_dtype(x.device)
    return x.to(dtype) @ rotation.to(dtype)
