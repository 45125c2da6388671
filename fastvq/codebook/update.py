"""How codebooks learn from vectors: one accumulation and one all-reduce for all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvq import distributed
from fastvq.ops import accumulate, ema_update_

from .candidates import Candidates

if TYPE_CHECKING:
    from .state import Codebook

Weight = float | Tensor | Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def learn_together(
    codebooks: Sequence[Codebook],
    inputs: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    *,
    weight: Weight | Sequence[Weight | None] | None = None,
    ema_update: bool | None = None,
    accumulate_only: bool = False,
) -> None:
    """Moves each codebook to its vectors, and revives its dead codes. Nothing waits for the device.

    A forward that is recomputed for its gradient changes nothing. All take part in one `accumulate` and, over several
    ranks, in one all-reduce: that of their counts, sums and rows for revival, so that every rank comes to the same
    bits. A codebook that stands here more than once, because levels share it, takes its turns in the moving averages,
    and its codes follow once, at the end.

    Args:
        codebooks: Q of them, with one D.
        inputs: vectors, a tensor (Q, H, N, D) or Q tensors (H, N, D).
        indices: (Q, H, N) or Q tensors (H, N) int64, -1 for what doesn't count.
        weight: factor of a step's (1 - decay), () or (K,) or (H, K), or a function of (sums, counts) that returns one;
            or one of these for each codebook. A codebook whose weight () is zero stays as it is, to the bit.
        ema_update: use the moving averages, instead of the codebooks' own setting.
        accumulate_only: keep counts and sums for the next step without this, or for `Codebook.commit_`.
    """
    learning = [codebook.learns(ema_update) for codebook in codebooks]
    if not any(learning) or not len(codebooks) or distributed.recomputing():
        return
    if not all(learning):
        kept = [place for place, learns in enumerate(learning) if learns]
        codebooks = [codebooks[i] for i in kept]
        inputs, indices = [inputs[i] for i in kept], [indices[i] for i in kept]
        weight = [weight[i] for i in kept] if isinstance(weight, (list, tuple)) else weight
    if any(codebook.affine is not None for codebook in codebooks):
        inputs = [codebook.own_rows(x) for codebook, x in zip(codebooks, inputs, strict=True)]
    counts, sums = _statistics(codebooks, inputs, indices)
    if accumulate_only:
        for codebook, count, total in zip(codebooks, counts, sums, strict=True):
            codebook.hold_(count, total)
        return
    for codebook, count, total in zip(codebooks, counts, sums, strict=True):
        codebook.take_held_(count, total)
    weights: Sequence[Any] = weight if isinstance(weight, (list, tuple)) else [weight] * len(codebooks)
    unique = list(dict.fromkeys(codebooks))
    found: dict[Codebook, list[Candidates]] = {}
    for codebook in unique:
        if codebook.reviver is not None:
            mine = [place for place, other in enumerate(codebooks) if other is codebook]
            rows = torch.cat([inputs[i] for i in mine], 1) if len(mine) > 1 else inputs[mine[0]]
            mask = torch.cat([indices[i] for i in mine], 1) >= 0 if len(mine) > 1 else indices[mine[0]] >= 0
            found[codebook] = codebook.candidates(rows, mask)
    if unique[0].together():
        distributed.sum_(*counts, *sums, *(t for all_found in found.values() for pair in all_found for t in pair))
    for codebook in unique:
        mine = [place for place, other in enumerate(codebooks) if other is codebook]
        steps = [(counts[i], sums[i], _share(codebook, counts[i], sums[i], weights[i])) for i in mine]
        _average_(codebook, steps, ema_update)
        if codebook in found:
            codebook.revive_from_(found[codebook])


def _statistics(
    codebooks: Sequence[Codebook], inputs: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """counts (H, K) and sums (H, K, D) of each codebook, by one pass over all rows: one codebook behind the other."""
    rows = inputs if isinstance(inputs, Tensor) else [x.flatten(0, 1) for x in inputs]
    rows = rows.flatten(0, -2) if isinstance(rows, Tensor) else rows[0] if len(rows) == 1 else torch.cat(rows)
    sizes = [codebook.heads * codebook.size for codebook in codebooks]
    counts, sums = accumulate(rows, _offset_indices(codebooks, indices), sum(sizes))
    shapes = [(codebook.heads, codebook.size) for codebook in codebooks]
    if len(shapes) == 1:
        return [counts.view(shapes[0])], [sums.view(*shapes[0], -1)]
    if len(set(shapes)) == 1:
        every = (len(codebooks), *shapes[0])
        return list(counts.view(every).unbind()), list(sums.view(*every, -1).unbind())
    parts = zip(shapes, counts.split(sizes), sums.split(sizes), strict=True)
    of_each = [(count.view(shape), total.view(*shape, -1)) for shape, count, total in parts]
    return [count for count, _ in of_each], [total for _, total in of_each]


def _offset_indices(codebooks: Sequence[Codebook], indices: Tensor | Sequence[Tensor]) -> Tensor:
    """The indices in one codebook that holds the heads of all, flat; -1 stays."""
    if len(codebooks) == codebooks[0].heads == 1:
        return indices[0].flatten()
    if isinstance(indices, Tensor) and len({codebook.size for codebook in codebooks}) == 1:
        chosen = indices.flatten(0, 1)
        starts = torch.arange(0, len(chosen) * codebooks[0].size, codebooks[0].size, device=chosen.device)
        return torch.where(chosen < 0, -1, chosen + starts[:, None]).flatten()
    offset, shifted = 0, []
    for codebook, chosen in zip(codebooks, indices, strict=True):
        starts = torch.arange(offset, offset + codebook.heads * codebook.size, codebook.size, device=chosen.device)
        shifted.append(torch.where(chosen < 0, -1, chosen + starts[:, None]).flatten())
        offset += codebook.heads * codebook.size
    return torch.cat(shifted)


Step = tuple[Tensor, Tensor, Tensor | None]
"""counts (H, K), sums (H, K, D) and the weight (H, K), or None for one."""


def _average_(codebook: Codebook, steps: list[Step], ema_update: bool | None) -> None:
    """The moving averages of one codebook over one step, or one of each level that shares it, and then its codes."""
    averages = codebook.averages(ema_update)
    if averages and len(steps) == 1 and steps[0][2] is None and not codebook.manual_ema_update:
        counts, sums, _ = steps[0]
        for head in range(codebook.heads):
            ema_update_(
                codebook.embed[head],
                codebook.cluster_size[head],
                codebook.embed_avg[head],
                counts[head],
                sums[head],
                decay=codebook.decay,
                eps=codebook.eps,
            )
        codebook.normalise_()
        return
    for counts, sums, weight in steps:
        share = torch.full_like(codebook.cluster_size, 1 - codebook.decay)
        share = share if weight is None else share * weight
        codebook.cluster_size.lerp_(counts, share)
        if averages:  # without them, the sizes alone, for revival to go by
            codebook.embed_avg.lerp_(sums, share[..., None])
    if averages and (not codebook.manual_ema_update or len(steps) > 1):
        weights = [weight for *_, weight in steps]
        before = None if any(weight is None for weight in weights) else codebook.embed.detach().clone()
        codebook.update_ema()
        if before is not None:
            moved = torch.stack([(weight != 0).any() for weight in weights if weight is not None]).any()
            codebook.embed.copy_(torch.where(moved, codebook.embed, before))


def _share(codebook: Codebook, counts: Tensor, sums: Tensor, weight: Weight | None) -> Tensor | None:
    """The weight as (H, K)."""
    if weight is None:
        return None
    given = torch.as_tensor(weight(sums, counts) if callable(weight) else weight, device=counts.device)
    given = given[None] if given.dim() == 1 else given
    shape = (codebook.heads, codebook.size)
    if given.dim() and given.shape != shape:
        raise ValueError(f"ema_update_weight: must have shape (), ({shape[1]},) or {shape}, got {tuple(given.shape)}")
    return given.to(codebook.cluster_size).expand(shape)
