"""The public functions and records of fastvq; importing this module registers the ops and imports torch."""

from __future__ import annotations

from .backends.select import use_backend
from .codebook import Replacement
from .codebook.health import HealthReport, dead_share, perplexity, usage
from .functional.binary_assign import BinaryAssignment, binary_assign
from .functional.quantize import Quantized, quantize
from .functional.residual_quantize import ResidualQuantized, residual_quantize
from .functional.soft_assign import SoftAssignment, cross_entropy, mean_assignment_entropy, soft_assign, soft_lookup
from .ops import accumulate, ema_update_, min_distance_, residual_search, sample, search, topk_search

__all__ = [
    "BinaryAssignment",
    "HealthReport",
    "Quantized",
    "Replacement",
    "ResidualQuantized",
    "SoftAssignment",
    "accumulate",
    "binary_assign",
    "cross_entropy",
    "dead_share",
    "ema_update_",
    "mean_assignment_entropy",
    "min_distance_",
    "perplexity",
    "quantize",
    "residual_quantize",
    "residual_search",
    "sample",
    "search",
    "soft_assign",
    "soft_lookup",
    "topk_search",
    "usage",
    "use_backend",
]
