"""Gumbel noise from a counter-based random number generator."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of Philox4x32-10 for four counter words and the key `seed`, 64 bits, low word first.

    Words are int64 tensors that broadcast.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011, section 4.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # int64 wraps around, so a product keeps its low 64 bits, and it has no others.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def noise_words(head: int, row: Tensor, block: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the words of the codes 4 block, ..., 4 block + 3 of each row."""
    return philox((block, row & _WORD, row >> 32, torch.full_like(row, head)), seed)


def gumbel(words: Tensor) -> Tensor:
    """Return -ln(-ln u) in float64 for u = (word + 1/2) 2^-32."""
    return -(-((words.double() + 0.5) * 2.0**-32).log()).log()
