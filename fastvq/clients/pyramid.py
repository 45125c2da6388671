"""Quantizer of VAR: one codebook for the residuals at growing resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Call, ClientAdapter, noise
from .nearest import nearest

VAR = "VAR 2241199"


class _Pyramid(nn.Module):
    """The encoding of VAR, which its transformer trains on. `forward`, which trains the tokenizer, stays VAR's."""

    embedding: nn.Embedding
    quant_resi: Any
    using_znorm: bool
    v_patch_nums: Sequence[int]
    prog_si: int

    def f_to_idxBl_or_fhat(self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Any = None) -> list[Tensor]:
        batch, channels, *size = f_BChw.shape
        sizes = [(one, one) if isinstance(one, int) else tuple(one) for one in v_patch_nums or self.v_patch_nums]
        if list(sizes[-1]) != size:
            raise AssertionError(f"the last of the patch sizes must be that of the features, {size}, got {sizes[-1]}")
        rest = f_BChw.detach().clone()
        total = torch.zeros_like(rest)
        results = []
        for scale, own in enumerate(sizes):
            if 0 <= self.prog_si < scale:
                break
            is_last = scale == len(sizes) - 1
            small = rest if is_last else F.interpolate(rest, size=own, mode="area")
            indices = _nearest(self, small.permute(0, 2, 3, 1).reshape(-1, channels))
            codes = self.embedding(indices.view(batch, *own)).permute(0, 3, 1, 2)
            if not is_last:
                codes = F.interpolate(codes, size=size, mode="bicubic")
            codes = self.quant_resi[scale / (len(sizes) - 1)](codes.contiguous())
            total.add_(codes)
            rest.sub_(codes)
            results.append(total.clone() if to_fhat else indices.reshape(batch, -1))
        return results


def _nearest(module: _Pyramid, rows: Tensor) -> Tensor:
    codes = module.embedding.weight.detach()
    if module.using_znorm:
        return nearest(F.normalize(rows, dim=-1), F.normalize(codes, dim=-1), metric="dot")
    return nearest(rows, codes)


def _trial(module: Any) -> list[Call]:
    last = module.v_patch_nums[-1]
    size = (last, last) if isinstance(last, int) else tuple(last)
    x = noise(module, 1, module.embedding.weight.shape[1], *size)
    return [Call("f_to_idxBl_or_fhat", x, to_fhat) for to_fhat in (False, True)]


def _refuse(module: Any) -> str:
    return "" if len(module.v_patch_nums) > 1 else "has only one resolution"


ADAPTERS = (
    ClientAdapter(
        VAR,
        ("VectorQuantizer2",),
        ("embedding", "quant_resi", "using_znorm", "v_patch_nums", "prog_si"),
        _Pyramid,
        _trial,
        _refuse,
    ),
)
