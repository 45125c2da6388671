"""Codebooks and their learning: k-means, moving averages, replacement of dead codes, in one process or several."""

from __future__ import annotations

from .fit import Fitted
from .kmeans import kmeans
from .replacement import Replacement
from .state import Codebook, learn_together

__all__ = ["Codebook", "Fitted", "Replacement", "kmeans", "learn_together"]
