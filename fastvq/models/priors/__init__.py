"""Priors over grids of codes: which codes follow which. `Prior` is what they share; each says how it reads a grid."""

from __future__ import annotations

from fastvq.models.priors.base import Prior
from fastvq.models.priors.transformer import TransformerPrior

__all__ = ["Prior", "TransformerPrior"]
