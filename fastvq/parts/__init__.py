"""Parts that quantizers are composed from, each usable by itself.

| module | content |
|---|---|
| `shapes` | sequences, images and video as rows; heads |
| `masking` | masks of rows; rows with NaN or infinity |
| `indices` | validation of indices; one index for the levels of several dimensions |
| `gradients` | straight-through estimator, rotation trick, DiVeQ, synchronous updates |
| `tables` | codes of all rows, of each row, or of each row by a network; index backpropagation |
| `losses` | orthogonality, entropies, moments |
| `gumbel` | Gumbel-softmax samples of codes |
| `schedules` | numbers that move in training |
| `balance` | assignments that use all codes about equally |
| `semantic_ids` | indices that name items: collisions, and unique ones |
| `bridge` | the network of FVQ through which all codes learn |
| `dropout` | quantize dropout, nested dropout |
| `factorized` | residual search through projections |
| `beam` | beam search through residual stages |
| `scalar` | squashing functions, grids of levels, thresholds |
| `binary` | transformations before binary codes |
| `projection` | projections between the dimensions of vectors and codes |
"""

from __future__ import annotations

from .balance import balanced_assignment
from .binary import CosineSimLinear, on_sphere, random_rotation, soft_clamp
from .bridge import VQBridge
from .dropout import ActiveStages, QuantizeDropout, common_seed, draw_seed, draw_stage_count
from .factorized import factorized_search
from .gradients import directional_reparam, rotate_to, scale_gradient, straight_through, synchronous
from .gumbel import gumbel_lookup
from .losses import assignment_entropies, binary_entropies, entropy_loss
from .scalar import Bound, Thresholds, with_slope
from .schedules import Annealed
from .semantic_ids import collisions, unique_ids
from .shapes import Layout
from .tables import index_backpropagation

__all__ = [
    "ActiveStages",
    "Annealed",
    "Bound",
    "CosineSimLinear",
    "Layout",
    "QuantizeDropout",
    "Thresholds",
    "VQBridge",
    "assignment_entropies",
    "balanced_assignment",
    "binary_entropies",
    "collisions",
    "common_seed",
    "directional_reparam",
    "draw_seed",
    "draw_stage_count",
    "entropy_loss",
    "factorized_search",
    "gumbel_lookup",
    "index_backpropagation",
    "on_sphere",
    "random_rotation",
    "rotate_to",
    "scale_gradient",
    "soft_clamp",
    "straight_through",
    "synchronous",
    "unique_ids",
    "with_slope",
]
