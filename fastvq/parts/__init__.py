"""The parts that quantizers are composed from, each usable by itself.

`layout`: sequences, images and video as rows, and their masks. `estimators`: gradients through the nearest code.
`dropout`: how many levels of a residual quantizer are kept.
"""

from __future__ import annotations

from .dropout import Kept, QuantizeDropout, common_seed, draw_seed, kept_levels
from .estimators import directional_reparam, rotate_to, scale_gradient, straight_through, synchronous
from .layout import Layout

__all__ = [
    "Kept",
    "Layout",
    "QuantizeDropout",
    "common_seed",
    "directional_reparam",
    "draw_seed",
    "kept_levels",
    "rotate_to",
    "scale_gradient",
    "straight_through",
    "synchronous",
]
