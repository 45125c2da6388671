"""Semantic IDs: indices of all stages that name an item, and what makes them unique."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.functional.quantize import lookup
from fastvq.ops import topk_search

from .arguments import check_sizes
from .indices import checked_indices


class Collisions(NamedTuple):
    """Result of `collisions`."""

    groups: Tensor  # (N,) int64: number of the ID of each item, equal for equal IDs
    distinct: int  # number of different IDs
    items: int  # number of items that share their ID with another
    largest: int  # number of items of the most frequent ID


def collisions(indices: Tensor) -> Collisions:
    """Report which items have the same ID: indices (N, Q) of N items."""
    if indices.dim() != 2:
        raise ValueError(f"indices: must have shape (N, Q), got {tuple(indices.shape)}")
    if not len(indices):
        return Collisions(indices.new_zeros(0), 0, 0, 0)
    _, groups, counts = indices.unique(dim=0, return_inverse=True, return_counts=True)
    return Collisions(groups, len(counts), int((counts[groups] > 1).sum()), int(counts.max()))


class UniqueIds(NamedTuple):
    """Result of `unique_ids`."""

    indices: Tensor  # (N, Q) int64, all different
    moved: Tensor  # (N,) bool: items whose ID isn't that of their nearest path


@torch.no_grad()
def unique_ids(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor | None = None, *, beam: int = 8, most: int = 1024
) -> UniqueIds:
    """Give each vector an ID of its own: the nearest free path through the stages.

    Items that collide are served in the order of their error. The first keeps its ID; each other takes the best of its
    paths that no item has, of the `beam` best of a search of the k nearest codes of each stage. Where none is free, the
    beam doubles.

    Args:
        x: (N, D), the vectors that the stages quantize (after a projection).
        codebooks: Q codebooks (K_q, D).
        indices: (N, Q), the IDs to begin with; by default those of the greedy search.
        beam: number of paths to begin with, at least 1.
        most: the largest beam.

    Raises:
        ValueError: a vector is not finite, there are fewer IDs than items, or no free path is among the `most` best.
    """
    check_sizes(beam=beam, most=most)
    if not len(codebooks):
        raise ValueError("codebooks: must be at least one")
    if x.dim() != 2 or not bool(x.isfinite().all()):
        raise ValueError(f"x: must be finite vectors of shape (N, D), got {tuple(x.shape)}")
    total = 1
    for codebook in codebooks:
        total *= len(codebook)
    if total < len(x):
        raise ValueError(f"codebooks: have {total} IDs, fewer than the {len(x)} items")
    if indices is not None:
        found = indices.clone()
    elif len(x):
        found = _best_paths(x, codebooks, 1)[:, 0]
    else:
        found = torch.zeros(0, len(codebooks), dtype=torch.int64, device=x.device)
    if found.shape != (len(x), len(codebooks)):
        raise ValueError(f"indices: must have shape {(len(x), len(codebooks))}, got {tuple(found.shape)}")
    for codebook, own in zip(codebooks, found.unbind(1), strict=True):
        if bool((checked_indices(own, len(codebook)) < 0).any()):
            raise ValueError("indices: must have a code of every stage, got -1")
    if not len(x):
        return UniqueIds(found, torch.zeros(0, dtype=torch.bool, device=x.device))
    codes = [lookup(codebook, own) for codebook, own in zip(codebooks, found.unbind(1), strict=True)]
    errors = (x - torch.stack(codes).sum(0)).square().sum(1)
    beam = min(beam, most)
    groups, moved = collisions(found).groups, torch.zeros(len(x), dtype=torch.bool)
    order = errors.argsort(stable=True).tolist()
    seen, waiting = set(), []
    for item in order:
        group = int(groups[item])
        if group in seen:
            waiting.append(item)
        seen.add(group)
    taken = {tuple(row) for row in found.tolist()}
    while waiting:
        tried = _best_paths(x[waiting], codebooks, beam).tolist()
        left = []
        for item, own in zip(waiting, tried, strict=True):
            free = next((path for path in map(tuple, own) if path not in taken), None)
            if free is None:
                left.append(item)
                continue
            taken.add(free)
            found[item] = torch.tensor(free)
            moved[item] = True
        if left and beam >= min(most, total):
            raise ValueError(f"most: {len(left)} items have no free ID among their {beam} best; allow more than {most}")
        waiting, beam = left, min(2 * beam, most, total)
    return UniqueIds(found, moved.to(found.device))


def _best_paths(x: Tensor, codebooks: Sequence[Tensor], beam: int) -> Tensor:
    """Return the paths (N, B, Q) of a beam search, nearest first; B is at most `beam`."""
    residual, paths = x[:, None], torch.zeros(len(x), 1, 0, dtype=torch.int64, device=x.device)
    for codebook in codebooks:
        count = min(beam, len(codebook))
        chosen = topk_search(residual.flatten(0, 1), codebook, count).view(len(x), -1, count)
        left = residual[:, :, None] - lookup(codebook, chosen)
        errors = left.square().sum(-1).flatten(1)
        kept = errors.argsort(dim=1, stable=True)[:, :beam]
        longer = torch.cat([paths[:, :, None].expand(-1, -1, count, -1), chosen[..., None]], -1).flatten(1, 2)
        paths = longer.gather(1, kept[..., None].expand(-1, -1, longer.shape[-1]))
        residual = left.flatten(1, 2).gather(1, kept[..., None].expand(-1, -1, x.shape[1]))
    return paths
