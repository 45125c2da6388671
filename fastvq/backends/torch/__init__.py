"""The torch backend: every op in chunked torch operations.

It needs neither a compiler nor Triton and serves every device that has float64.
"""

from __future__ import annotations

from fastvq.backends import Ops

from . import (
    accumulate,
    binary_assign,
    ema_update,
    min_distance,
    quantize,
    residual_quantize,
    residual_search,
    sample,
    search,
    soft_assign,
    topk_search,
)

OPS: Ops = {
    "search": search.search,
    "residual_search": residual_search.residual_search,
    "topk_search": topk_search.topk_search,
    "quantize_forward": quantize.quantize_forward,
    "quantize_backward": quantize.quantize_backward,
    "residual_quantize_forward": residual_quantize.residual_quantize_forward,
    "residual_quantize_backward": residual_quantize.residual_quantize_backward,
    "accumulate": accumulate.accumulate,
    "ema_update_": ema_update.ema_update_,
    "min_distance_": min_distance.min_distance_,
    "binary_assign_forward": binary_assign.binary_assign_forward,
    "binary_assign_backward": binary_assign.binary_assign_backward,
    "soft_assign_forward": soft_assign.soft_assign_forward,
    "soft_assign_backward": soft_assign.soft_assign_backward,
    "sample": sample.sample,
}
