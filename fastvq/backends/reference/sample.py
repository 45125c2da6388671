"""The op `sample` by definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.arithmetic import chunk_rows, widen
from fastvq.backends.noise import gumbel, noise_words

from .search import scores_by_definition


def logits_of(scores: Tensor, metric: str) -> Tensor:
    """Return the logits of the scores of `scores_by_definition`: -|x - e| or <x, e>."""
    return -scores.sqrt() if metric == "l2" else -scores


def sample(x: Tensor, codebook: Tensor, *, temperature: float, seed: Tensor, metric: str = "l2") -> Tensor:
    """Implement `fastvq.sample`."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    heads = zip(x, codebook, indices, strict=True) if x.dim() == 3 else [(x, codebook, indices)]
    for head, (xh, eh, out) in enumerate(heads):
        _sample_head(xh, eh, head, temperature, seed.to(x.device), metric, out)
    return indices


def _sample_head(
    x: Tensor, codebook: Tensor, head: int, temperature: float, seed: Tensor, metric: str, out: Tensor
) -> None:
    size = len(codebook)
    codes = torch.arange(size, device=x.device)
    blocks = torch.arange((size + 3) // 4, device=x.device)
    usable = codebook.isfinite().all(1)
    rows = chunk_rows(size)
    for first in range(0, len(x), rows):
        wide = widen(x[first : first + rows])
        number = torch.arange(first, first + len(wide), device=x.device)
        words = torch.stack(noise_words(head, number[:, None], blocks, seed), -1).flatten(1)[:, :size]
        logits = logits_of(scores_by_definition(wide, widen(codebook), metric), metric)
        perturbed = logits / temperature + gumbel(words)
        largest = perturbed.masked_fill(~usable, -torch.inf).amax(1, keepdim=True)
        lowest = torch.where((perturbed == largest) & usable, codes, size).amin(1)
        answered = wide.isfinite().all(1) & (lowest < size)
        out[first : first + rows] = torch.where(answered, lowest, -1)
