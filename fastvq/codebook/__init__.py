"""Codebook learning: state, k-means, moving averages, revival of dead codes, in one process or in many."""

from __future__ import annotations

from .kmeans import kmeans
from .replacement import Revival
from .state import Codebook
from .update import learn_together

__all__ = ["Codebook", "Revival", "kmeans", "learn_together"]
