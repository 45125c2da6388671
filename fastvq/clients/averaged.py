"""Codebooks that learn by moving averages, as VQ-VAE-2 and Jukebox implement them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Call, ClientAdapter, client_globals, near
from .nearest import nearest, nearest_while_learning, statistics

ROSINALITY = "rosinality/vq-vae-2-pytorch 29e36e7"
JUKEBOX = "jukebox 711a575"


class _Rosinality(nn.Module):
    """The codebook has shape (D, K) there."""

    dim: int
    n_embed: int
    decay: float
    eps: float
    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    embed_code: Any

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = input.reshape(-1, self.dim)
        find = nearest_while_learning if self.training else nearest
        found = find(rows, self.embed.t())
        indices = found.view(input.shape[:-1])
        codes = self.embed_code(indices)
        if self.training:
            with torch.no_grad():
                _learn(self, rows.detach(), found)
        error = (codes.detach() - input).square().mean()
        return input + (codes - input).detach(), error, indices


def _learn(codebook: _Rosinality, rows: Tensor, indices: Tensor) -> None:
    counts, sums = statistics(rows, indices, codebook.n_embed)
    sums = sums.t().contiguous()
    distributed = client_globals(codebook, "forward").get("dist_fn")
    if distributed is not None:
        distributed.all_reduce(counts)
        distributed.all_reduce(sums)
    codebook.cluster_size.data.mul_(codebook.decay).add_(counts.to(codebook.cluster_size), alpha=1 - codebook.decay)
    codebook.embed_avg.data.mul_(codebook.decay).add_(sums.to(codebook.embed_avg), alpha=1 - codebook.decay)
    total, eps = codebook.cluster_size.sum(), codebook.eps
    sizes = (codebook.cluster_size + eps) / (total + codebook.n_embed * eps) * total
    codebook.embed.data.copy_(codebook.embed_avg / sizes)


class _Jukebox(nn.Module):
    k: Tensor

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = nearest(x, self.k)
        return indices, (x - F.embedding(indices, self.k)).square().sum(-1).mean()


def _rosinality_trial(module: Any) -> list[Call]:
    rows = near(module.embed.t())[None]
    return [Call("forward", rows), Call("forward", rows, training=True)]


def _refuse_unknown_reduction(module: Any) -> str:
    method = type(module).forward
    if "all_reduce" in method.__code__.co_names and "dist_fn" not in method.__globals__:
        return "forward reduces over ranks by other means than dist_fn"
    return ""


def _jukebox_trial(module: Any) -> list[Call]:
    rows = near(module.k)
    # The error is a difference of large numbers in the client, so that rows must not lie too near to the codes.
    return [Call("quantise", rows + 0.3 * torch.randn_like(rows))]


ADAPTERS = (
    ClientAdapter(
        ROSINALITY,
        ("Quantize",),
        ("dim", "n_embed", "decay", "eps", "embed", "embed_avg", "cluster_size", "embed_code"),
        _Rosinality,
        _rosinality_trial,
        _refuse_unknown_reduction,
        frozenset({"all_reduce"}),
    ),
    ClientAdapter(JUKEBOX, ("BottleneckBlock",), ("k", "k_bins", "mu", "dequantise"), _Jukebox, _jukebox_trial),
)
