"""Random codes by their soft assignment, by definition: Gumbel noise from a counter, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .search import CHUNK_ELEMENTS, scores_by_definition, widen

_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words of 32 bits from four words of counter, as int64 tensors that broadcast, and the
    64 bits of `seed`, its low word first.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011, section 4.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # int64 wraps around, so the low 64 bits of a product are right, and all that there are.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def noise_words(head: int, row: Tensor, block: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of the codes 4 block, ..., 4 block + 3 of each row."""
    return philox((block, row & _WORD, row >> 32, torch.full_like(row, head)), seed)


def gumbel(words: Tensor) -> Tensor:
    """-ln(-ln u) in float64 for u = (word + 1/2) 2^-32."""
    return -(-((words.double() + 0.5) * 2.0**-32).log()).log()


def logits_of(scores: Tensor, metric: str) -> Tensor:
    """The logits that belong to the scores of `scores_by_definition`: -|x - e| or <x, e>."""
    return -scores.sqrt() if metric == "l2" else -scores


def sample(x: Tensor, codebook: Tensor, *, temperature: float, seed: Tensor, metric: str = "l2") -> Tensor:
    """A random code for each vector: `fastvq.sample` defines what this computes."""
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
    rows = max(1, CHUNK_ELEMENTS // size)
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
