"""Quantizers of RQ-VAE recommenders, which turn the vectors of items into semantic IDs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Call, ClientAdapter, client_globals, near
from .nearest import nearest

BOTTA = "RQ-VAE-Recommender 088595d"
LC_REC = "LC-Rec"


class _Quantize(nn.Module):
    do_kmeans_init: bool
    kmeans_initted: bool
    embedding: nn.Embedding
    forward_mode: Any
    out_proj: nn.Module
    get_item_embeddings: Any

    def forward(self, x: Tensor, temperature: Any) -> Any:
        names = client_globals(self, "forward")
        straight_through = self.forward_mode == names["QuantizeForwardMode"].STE
        if self.training and not straight_through:
            return super().forward(x, temperature)
        if self.do_kmeans_init and not self.kmeans_initted:
            self._kmeans_init(x=x)  # type: ignore[operator]
        indices = nearest(x, self.out_proj(self.embedding.weight))
        codes = self.get_item_embeddings(indices)
        output = x + (codes - x).detach() if self.training else codes
        return names["QuantizeOutput"](embeddings=output, ids=indices)


class _LcRec(nn.Module):
    beta: float
    e_dim: int
    sk_epsilon: float | None
    initted: bool
    embedding: nn.Embedding

    def forward(self, x: Tensor, use_sk: bool = True) -> Any:
        if use_sk and self.sk_epsilon is not None and self.sk_epsilon > 0:
            return super().forward(x, use_sk)  # a balanced assignment
        rows = x.view(-1, self.e_dim)
        if not self.initted and self.training:
            self.init_emb(rows)  # type: ignore[operator]
        indices = nearest(rows, self.embedding.weight).view(x.shape[:-1])
        codes = self.embedding(indices).view(x.shape)
        loss = F.mse_loss(codes, x.detach()) + self.beta * F.mse_loss(codes.detach(), x)
        return x + (codes - x).detach(), loss, indices


def _trial(module: Any) -> list[Call]:
    module.kmeans_initted = True
    rows = near(module.out_proj(module.embedding.weight))
    return [Call("forward", rows, 0.5), Call("forward", rows, 0.5, training=True)]


def _refuse(module: Any) -> str:
    missing = {"QuantizeForwardMode", "QuantizeOutput"} - type(module).forward.__globals__.keys()
    return f"its module has no {', '.join(sorted(missing))}" if missing else ""


def _lc_rec_trial(module: Any) -> list[Call]:
    module.initted = True
    rows = near(module.embedding.weight)
    return [Call("forward", rows, False), Call("forward", rows, False, training=True)]


ADAPTERS = (
    ClientAdapter(
        BOTTA,
        ("Quantize",),
        ("forward_mode", "do_kmeans_init", "kmeans_initted", "embedding", "out_proj", "get_item_embeddings"),
        _Quantize,
        _trial,
        _refuse,
    ),
    ClientAdapter(
        LC_REC,
        ("VectorQuantizer",),
        ("embedding", "beta", "e_dim", "sk_epsilon", "initted", "init_emb"),
        _LcRec,
        _lc_rec_trial,
    ),
)
