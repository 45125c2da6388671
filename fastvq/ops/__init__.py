"""Every op: its schema, its argument checks, its fake and its choice of backend, once each."""

from __future__ import annotations

from .binary import binary_assign_backward, binary_assign_forward
from .learning import accumulate, ema_update_
from .registry import GRADIENTS
from .sampling import sample
from .searches import residual_search, search, topk_search
from .seeding import min_distance_
from .soft import soft_assign_backward, soft_assign_forward
from .steps import (
    quantize_backward,
    quantize_forward,
    residual_quantize_backward,
    residual_quantize_forward,
)

__all__ = [
    "GRADIENTS",
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
