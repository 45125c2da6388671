"""The specification: every op in plain PyTorch, written to be read and checked, not to be fast.

Every other backend must return the same indices as this one, to the last one. No N x K matrix exists at any time:
rows are taken in chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .accumulate import accumulate, check_indices, ema_update_
from .binary_assign import binary_assign_backward, binary_assign_forward
from .min_distance import min_distance_
from .quantize import (
    SHORTEST,
    difference,
    quantize_backward,
    quantize_forward,
    residual_quantize_backward,
    residual_quantize_forward,
)
from .sample import sample
from .search import compute_dtype, residual_search, scores_by_definition, search, topk_search, widen
from .soft_assign import result_dtype, soft_assign_backward, soft_assign_forward

Ops = dict[str, Callable[..., Any]]
"""A backend's implementations, by the name of the op."""

OPS: Ops = {
    "search": search,
    "residual_search": functools.partial(residual_search, search=search),
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
    "SHORTEST",
    "Ops",
    "accumulate",
    "binary_assign_backward",
    "binary_assign_forward",
    "check_indices",
    "compute_dtype",
    "difference",
    "ema_update_",
    "min_distance_",
    "quantize_backward",
    "quantize_forward",
    "residual_quantize_backward",
    "residual_quantize_forward",
    "residual_search",
    "result_dtype",
    "sample",
    "scores_by_definition",
    "search",
    "soft_assign_backward",
    "soft_assign_forward",
    "topk_search",
    "widen",
]
