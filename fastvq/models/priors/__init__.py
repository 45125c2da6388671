"""Priors over grids of indices. `Prior` holds what they share; each module is one architecture."""

from __future__ import annotations

from .base import Prior
from .depth import DepthPrior
from .hierarchical import HierarchicalPrior
from .lstm import LSTMPrior
from .next_scale import NextScalePrior
from .pixel_cnn import PixelCNNPrior
from .text import TextPrior
from .transformer import TransformerPrior

PRIORS: dict[str, type[Prior]] = {
    "transformer": TransformerPrior,
    "pixelcnn": PixelCNNPrior,
    "lstm": LSTMPrior,
    "depth": DepthPrior,
    "hierarchical": HierarchicalPrior,
    "next-scale": NextScalePrior,
}
"""Classes of priors by their name in settings."""
TEXT_PRIORS: dict[str, type[Prior]] = {"transformer": TextPrior}
"""Those of priors over text and indices."""

__all__ = [
    "PRIORS",
    "TEXT_PRIORS",
    "DepthPrior",
    "HierarchicalPrior",
    "LSTMPrior",
    "NextScalePrior",
    "PixelCNNPrior",
    "Prior",
    "TextPrior",
    "TransformerPrior",
]
