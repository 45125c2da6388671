"""The reference backend: the specification of every op, written to be read and checked, not to be fast.

Every other backend must return exactly the same indices. The N x K matrix is never materialized: rows are taken in
chunks.
"""

from __future__ import annotations

from fastvq.backends import Ops

from .accumulate import accumulate
from .binary_assign import binary_assign_backward, binary_assign_forward
from .ema_update import ema_update_
from .min_distance import min_distance_
from .quantize import quantize_backward, quantize_forward
from .residual_quantize import residual_quantize_backward, residual_quantize_forward
from .residual_search import residual_search
from .sample import sample
from .search import search
from .soft_assign import soft_assign_backward, soft_assign_forward
from .topk_search import topk_search

OPS: Ops = {
    "search": search,
    "residual_search": residual_search,
    "topk_search": topk_search,
    "quantize_forward": quantize_forward,
    "quantize_backward": quantize_backward,
    "residual_quantize_forward": residual_quantize_forward,
    "residual_quantize_backward": residual_quantize_backward,
    "accumulate": accumulate,
    "ema_update_": ema_update_,
    "min_distance_": min_distance_,
    "binary_assign_forward": binary_assign_forward,
    "binary_assign_backward": binary_assign_backward,
    "soft_assign_forward": soft_assign_forward,
    "soft_assign_backward": soft_assign_backward,
    "sample": sample,
}

__all__ = [
    "OPS",
    "accumulate",
    "binary_assign_backward",
    "binary_assign_forward",
    "ema_update_",
    "min_distance_",
    "quantize_backward",
    "quantize_forward",
    "residual_quantize_backward",
    "residual_quantize_forward",
    "residual_search",
    "sample",
    "search",
    "soft_assign_backward",
    "soft_assign_forward",
    "topk_search",
]
