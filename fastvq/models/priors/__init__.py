"""Priors over grids of indices. `Prior` holds what they share; each module is one architecture."""

from __future__ import annotations

from .base import Prior
from .hierarchical import HierarchicalPrior
from .lstm import LSTMPrior
from .next_scale import NextScalePrior
from .pixel_cnn import PixelCNNPrior
from .transformer import TransformerPrior

PRIORS: dict[str, type[Prior]] = {
    "transformer": TransformerPrior,
    "pixelcnn": PixelCNNPrior,
    "lstm": LSTMPrior,
    "hierarchical": HierarchicalPrior,
    "next-scale": NextScalePrior,
}
"""Classes of priors by their name in settings."""

__all__ = [
    "PRIORS",
    "HierarchicalPrior",
    "LSTMPrior",
    "NextScalePrior",
    "PixelCNNPrior",
    "Prior",
    "TransformerPrior",
]
