"""Priors over grids of indices. `Prior` holds what they share; each module is one architecture."""

from __future__ import annotations

from .base import Prior
from .lstm import LSTMPrior
from .pixel_cnn import PixelCNNPrior
from .transformer import TransformerPrior

PRIORS: dict[str, type[Prior]] = {"transformer": TransformerPrior, "pixelcnn": PixelCNNPrior, "lstm": LSTMPrior}
"""Classes of priors by their name in settings."""

__all__ = ["PRIORS", "LSTMPrior", "PixelCNNPrior", "Prior", "TransformerPrior"]
