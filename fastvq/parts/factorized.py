"""Factorized residual search: stages that project the residual, without making a residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.functional.quantize import lookup, unit_norm
from fastvq.ops import search
from fastvq.precision import widest_dtype


class FactorizedStage(NamedTuple):
    """Weights of a stage: x is projected to W x + b, and its code e back to O e + c."""

    into: Tensor  # W (D, C)
    into_bias: Tensor  # b (D,)
    back: Tensor  # O (C, D)
    back_bias: Tensor  # c (C,)
    codes: Tensor  # (K, D)


class FactorizedResult(NamedTuple):
    """Result of `factorized_search`: lists with an entry for each stage."""

    indices: list[Tensor]  # (B, T / stride)
    latents: list[Tensor]  # (B, D, T / stride), what the stage compares with its codes
    codes: list[Tensor]  # (B, D, T / stride)


Choice = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def factorized_search(
    x: Tensor,
    stages: Sequence[FactorizedStage],
    *,
    strides: Sequence[int] | None = None,
    mask: Tensor | None = None,
    missing: int = -1,
    choose: Choice | None = None,
) -> FactorizedResult:
    """Return the indices of factorized residual stages, all projections of the residuals in one product.

        z_q = W_q (x - sum_{p<q} (O_p e_p + c_p)) + b_q = (W_q x + b_q) - sum_{p<q} ((W_q O_p) e_p + W_q c_p)
        index_q = argmin_k |z_q / |z_q| - e_k / |e_k||^2

    W_q O_p is a matrix of D x D, so that no residual of C dimensions is made, nor kept for a gradient. A stage with
    stride s averages z_q over s positions, and its code stands for all of them.

    Args:
        x: (B, C, T), float32 or float64, finite where the mask is True.
        stages: the weights of each stage, in the dtype of x.
        strides: of each stage, dividing T; 1 by default.
        mask: bool (B, T), the positions that take part: averages are theirs, and a cell without any has index -1.
        missing: index of rows without a nearest code, as for `fastvq.search`.
        choose: a function of (place of the stage, latents (B, D, T / stride), their mask) that returns indices and
            codes, through which gradients pass; by default `nearest_direction` and the codes themselves.

    Returns:
        indices, latents and codes, whose sum is `factorized_output`.

    Source: Kumar et al., High-Fidelity Audio Compression with Improved RVQGAN (DAC), 2023, section 3.2, for the stages;
    Siuzdak et al., SNAC, 2024, section 3, for the strides.
    """
    strides = (1,) * len(stages) if strides is None else tuple(strides)
    wide = widest_dtype(x.device)
    into, (back, shifts) = torch.cat([stage.into for stage in stages]), _ways_back(stages)
    taken, shift = ((into.to(wide) @ other.to(wide)).to(x.dtype) for other in (back, shifts))
    projected = into @ x + torch.cat([stage.into_bias for stage in stages])[:, None]
    indices: list[Tensor] = []
    latents: list[Tensor] = []
    codes: list[Tensor] = []
    before: list[Tensor] = []  # the codes so far, at each position
    start = 0
    for place, (stage, stride) in enumerate(zip(stages, strides, strict=True)):
        end = start + len(stage.into)
        own = projected[:, start:end]
        if before:
            own = own - taken[start:end, :start] @ torch.cat(before, 1) - shift[start:end, :place].sum(1)[:, None]
        own, own_mask = pooled(own, stride, mask)
        if choose is None:
            chosen = nearest_direction(own, stage.codes, mask=own_mask, missing=missing)
            found = lookup(stage.codes, chosen).transpose(1, 2)
        else:
            chosen, found = choose(place, own, own_mask)
        indices.append(chosen)
        latents.append(own)
        codes.append(found)
        before.append(repeated(found, stride))
        start = end
    return FactorizedResult(indices, latents, codes)


def factorized_output(
    stages: Sequence[FactorizedStage],
    indices: Sequence[Tensor],
    codes: Sequence[Tensor],
    *,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return sum_q (O_q e_q + c_q), (B, C, T), over the stages whose index isn't -1.

    Args:
        stages: the weights of each stage.
        indices: (B, T / stride) of each stage.
        codes: (B, D, T / stride) of each stage, zeros for index -1.
        strides: of each stage; 1 by default.
    """
    strides = (1,) * len(stages) if strides is None else tuple(strides)
    back, shifts = _ways_back(stages)
    chosen = [repeated(one, stride) for one, stride in zip(codes, strides, strict=True)]
    present = [repeated((one >= 0)[:, None], stride) for one, stride in zip(indices, strides, strict=True)]
    return back @ torch.cat(chosen, 1) + shifts @ torch.cat(present, 1).to(shifts.dtype)


def _ways_back(stages: Sequence[FactorizedStage]) -> tuple[Tensor, Tensor]:
    """Return all O, (C, sum of D), and all c, (C, stages)."""
    return torch.cat([stage.back for stage in stages], 1), torch.stack([stage.back_bias for stage in stages], 1)


def nearest_direction(latents: Tensor, codes: Tensor, *, mask: Tensor | None = None, missing: int = -1) -> Tensor:
    """Return the index (B, T) of the code (K, D) with the nearest direction to latents (B, D, T)."""
    batch, dim, length = latents.shape
    rows = unit_norm(latents.detach().transpose(1, 2).reshape(batch * length, dim), 1e-12)
    found = search(
        rows, unit_norm(codes.detach(), 1e-12), mask=None if mask is None else mask.reshape(-1), missing=missing
    )
    return found.view(batch, length)


def pooled(x: Tensor, stride: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the averages (B, D, T / stride) of x (B, D, T) over each cell's positions in mask (B, T), and its mask.

    A cell is in the mask if any of its positions is.
    """
    if stride == 1:
        return x, mask
    cells = x.unflatten(2, (-1, stride))
    if mask is None:
        return cells.mean(-1), None
    parts = mask.unflatten(1, (-1, stride))
    total = cells.masked_fill(~parts[:, None], 0).sum(-1)
    return total / parts.sum(-1).clamp_min(1)[:, None], parts.any(-1)


def repeated(x: Tensor, stride: int) -> Tensor:
    """Return x (B, D, T) with each position `stride` times, (B, D, T stride)."""
    return x if stride == 1 else x.repeat_interleave(stride, 2)
