"""The parts that quantizers are composed from, each usable by itself.

`layout`: sequences, images and video as rows, and their masks. `estimators`: gradients through the nearest code.
`dropout`: how many levels of a residual quantizer are kept. `binary`: what stands before bits. `entropy`: of soft
assignments. `ibq`: the gradient to all codes.

Of scalar quantizers: `bound`, coordinates bounded and rounded to a grid; `thresholds`, rounding by exact comparison,
and its gradient; `squash`, monotone functions; `radix`, one index for many levels; `moments`, what latents are held to.
"""

from __future__ import annotations

from .binary import CosineSimLinear, on_sphere, random_rotation, soft_clamp
from .dropout import Kept, QuantizeDropout, common_seed, draw_seed, kept_levels
from .gradients import directional_reparam, rotate_to, scale_gradient, straight_through, synchronous
from .losses import assignment_entropies, binary_entropies, entropy_loss
from .scalar import Bound, Thresholds, sloped
from .shapes import Layout
from .tables import index_backpropagation

__all__ = [
    "Bound",
    "CosineSimLinear",
    "Kept",
    "Layout",
    "QuantizeDropout",
    "Thresholds",
    "assignment_entropies",
    "binary_entropies",
    "common_seed",
    "directional_reparam",
    "draw_seed",
    "entropy_loss",
    "index_backpropagation",
    "kept_levels",
    "on_sphere",
    "random_rotation",
    "rotate_to",
    "scale_gradient",
    "sloped",
    "soft_clamp",
    "straight_through",
    "synchronous",
]
