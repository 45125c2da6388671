"""The ops: schema, argument checks, fake and choice of backend of each, in one file."""

from __future__ import annotations

from .accumulate import accumulate
from .binary_assign import binary_assign_backward, binary_assign_forward
from .ema_update import ema_update_
from .min_distance import min_distance_
from .packed import PackedCodebook
from .quantize import quantize_backward, quantize_forward
from .residual_quantize import residual_quantize_backward, residual_quantize_forward
from .residual_search import residual_search
from .sample import sample
from .search import search
from .soft_assign import soft_assign_backward, soft_assign_forward
from .topk_search import topk_search

__all__ = [
    "PackedCodebook",
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
