"""The torch backend: every op in chunked torch operations. It needs no compiler and no Triton and serves every device
that has float64."""

from __future__ import annotations

import functools

import torch

from fastvq.backends import reference
from fastvq.backends.reference import Ops

from . import binary_assign, min_distance, sample, search, soft_assign, topk_search


def unavailable(device: torch.device) -> str:
    """Why this backend can't serve `device`; empty where it can."""
    return "mps has no float64, which defines the exact code" if device.type == "mps" else ""


OPS: Ops = {
    "search": search.search,
    "residual_search": functools.partial(reference.residual_search, search=search.search),
    "topk_search": topk_search.topk_search,
    "quantize_forward": reference.quantize_forward,
    "quantize_backward": reference.quantize_backward,
    "residual_quantize_forward": reference.residual_quantize_forward,
    "residual_quantize_backward": reference.residual_quantize_backward,
    "accumulate": reference.accumulate,
    "ema_update_": reference.ema_update_,
    "min_distance_": min_distance.min_distance_,
    "binary_assign_forward": binary_assign.binary_assign_forward,
    "binary_assign_backward": binary_assign.binary_assign_backward,
    "soft_assign_forward": soft_assign.soft_assign_forward,
    "soft_assign_backward": soft_assign.soft_assign_backward,
    "sample": sample.sample,
}
