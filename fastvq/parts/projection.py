"""Linear maps around a quantizer: projections to and from the dimension of its codes, and rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def projections(
    dim: int, codebook_dim: int, *, bias: bool = True, layernorm: bool = False
) -> tuple[nn.Module, nn.Module]:
    """(project_in, project_out) between dim and codebook_dim, with a layer norm behind the first if asked for;
    identities where they are equal.

    Source: Yu et al., Vector-quantized Image Modeling with Improved VQGAN, 2021, section 3.2 (low-dimensional codes).
    """
    if dim == codebook_dim:
        return nn.Identity(), nn.Identity()
    into: nn.Module = nn.Linear(dim, codebook_dim, bias=bias)
    if layernorm:
        into = nn.Sequential(into, nn.LayerNorm(codebook_dim))
    return into, nn.Linear(codebook_dim, dim, bias=bias)


def project_codes_out(project_out: nn.Module, codes: Tensor, mask: Tensor) -> Tensor:
    """project_out(codes (..., D)) in the projection's dtype, zero where counts (...) is False: the bias alone is no
    output. Codes of other strides are laid out first: a matrix product may depend on strides in its last bits."""
    if isinstance(project_out, nn.Linear):
        codes = project_out(codes.to(project_out.weight.dtype).contiguous())
    return codes.masked_fill(~mask.unsqueeze(-1), 0)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (..., d) @ rotation (d, d) in float64, where the device has it: neither TF32 nor autocast moves a code."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return x.to(dtype) @ rotation.to(dtype)
