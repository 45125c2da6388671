"""Sampling of an index from logits.

A module of its own, since it knows nothing of priors and is tested without one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-30
"""Temperature below which the most likely index is taken: the quotient would overflow float32."""


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Sample indices (B,) from logits (B, K); the arguments are those of `Prior.sample`."""
    if temperature < LEAST_TEMPERATURE:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the more likely ones already have probability top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
