"""Priors over grids of codes: which codes follow which. `Prior` is what they share; each says how it reads a grid."""

from __future__ import annotations

from .base import Prior
from .lstm import LSTMPrior
from .pixel_cnn import PixelCNNPrior
from .transformer import TransformerPrior

PRIORS: dict[str, type[Prior]] = {"transformer": TransformerPrior, "pixelcnn": PixelCNNPrior, "lstm": LSTMPrior}
"""By the name that settings have for them."""

__all__ = ["PRIORS", "LSTMPrior", "PixelCNNPrior", "Prior", "TransformerPrior"]
